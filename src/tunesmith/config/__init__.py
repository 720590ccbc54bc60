"""What the user asked for: frozen argument classes, the loader, the cross-field rules. Imports no torch."""
