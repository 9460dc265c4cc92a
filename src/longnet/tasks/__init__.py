"""Applications: classify whole documents, extract what they say. Texts in, records with character offsets out."""
