"""The toolkit command: thin verbs over the package."""
