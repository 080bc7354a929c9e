"""From what is known of a site to loss weights."""
