"""The configurations, as data; read by `union_igrot.cli.config`."""
