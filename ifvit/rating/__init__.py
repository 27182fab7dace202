"""Human ratings in the browser: a study made of drawn images, its web page, its results."""
