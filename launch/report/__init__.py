"""How findings are shown: terminal, page, record, figures, and docs/RESULTS.md."""
