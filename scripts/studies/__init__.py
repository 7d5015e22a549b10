"""The studies behind the pages of docs/, one folder each."""
