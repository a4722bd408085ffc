"""A searchable catalogue, with an optional second stage."""
