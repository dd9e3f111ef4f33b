"""Starting jobs: on this machine (`local`)."""
