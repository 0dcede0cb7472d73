"""What is done with the outputs of a task family's graphs: scores, masks, vectors, spans, summaries."""
