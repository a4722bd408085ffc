"""A searchable catalogue, with its second stage."""
