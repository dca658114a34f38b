"""prepare: recordings and steps become a store, once."""
