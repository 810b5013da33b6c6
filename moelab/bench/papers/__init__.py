"""The papers' own tables, measured here."""
