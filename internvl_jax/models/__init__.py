"""InternViT, QLLaMA, InternVL-C/G, InternVL-Chat and their presets."""
