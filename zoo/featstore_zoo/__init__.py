"""Acoustic models and vocoders that consume a store, one package each. torch lives here."""
