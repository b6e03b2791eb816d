"""What three real parties say to each other, recorded and tested: what a privacy engineer asks."""
