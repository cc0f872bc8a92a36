"""Token folders to and from other machines and the Hub."""
