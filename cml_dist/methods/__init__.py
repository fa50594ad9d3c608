"""Methods: a file a family of inner rules, and :mod:`cml_dist.methods.build` from the settings to one."""
