"""What embeddings look like: ``sempa analyze`` and ``sempa tokens``. For a new part, see :mod:`sempa_st.analysis.part`."""
