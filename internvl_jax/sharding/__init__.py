"""The only package that names mesh axes: the mesh, and the rules from logical axes to it."""
