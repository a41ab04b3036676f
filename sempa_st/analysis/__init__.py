"""What embeddings look like: ``sempa analyze`` and ``sempa tokens``. To add one, see :mod:`sempa_st.analysis.part`."""
