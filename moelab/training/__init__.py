"""How the bundled models were made; nothing else imports it."""
