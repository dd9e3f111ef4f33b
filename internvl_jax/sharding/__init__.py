"""The only package that names mesh axes: the mesh, the rules from logical axes to it, the report."""
