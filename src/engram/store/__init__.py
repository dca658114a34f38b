"""The store: a Zarr v3 group of recordings, with tables, checksums and a manifest."""
