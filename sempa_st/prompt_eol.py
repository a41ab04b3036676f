"""The name under which folders saved by earlier versions look for the module."""

from sempa_st.model.prompt_eol import PromptEOL

__all__ = ["PromptEOL"]
