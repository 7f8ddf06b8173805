"""Plain data for report.json and its tables."""
