"""The configurations, as data; read by `union_igrot.config`."""
