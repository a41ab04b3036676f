"""Files of sentences to files of vectors."""

from sempa_st.encoding.run import encode_file
from sempa_st.encoding.sentences import Sentences, read_sentences

__all__ = ["Sentences", "encode_file", "read_sentences"]
