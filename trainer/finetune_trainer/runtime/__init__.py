"""What every stage stands on: the work folder, proofs, the fence, errors, reports, and processes that work together."""
