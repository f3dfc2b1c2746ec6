"""What a run found, for people and machines: ``report.json`` in every form."""
