"""A site operator's side: will the first round work, does the hub answer, what does a round take."""
