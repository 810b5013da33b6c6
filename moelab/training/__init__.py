"""How the bundled models were made; nothing else imports it.

The demo model: `corpus` and `domains` (text), `train`, `card` and `page` (its card).  The mixture
of experts that is made of a dense model: `moefy`.
"""
