"""The documentation: pages, the script that fills what is generated in them, the check of the built site."""
