"""Importing this module puts the shipped models into MTEB's registry, so that ``mteb.get_model`` finds them.

``mteb.get_model("sempa-st/sempa-gemma3-270m")`` then loads one, and ``mteb.get_model_meta`` describes it. See
:mod:`sempa_st.evaluation.mteb_models` for other models.
"""

from sempa_st.evaluation.mteb_models import register, register_shipped

__all__ = ["register", "register_shipped"]

register_shipped()
