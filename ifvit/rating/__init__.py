"""Human ratings of generated images: make a study, serve it to raters, report the answers."""
