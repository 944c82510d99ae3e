"""The pages, built with mkdocs, and what generates parts of them."""
