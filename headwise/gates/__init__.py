"""Gates: runners and samples -> measurements -> verdicts, and what a model costs."""
