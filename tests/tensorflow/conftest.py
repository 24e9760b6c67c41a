"""Settings for the tests of the Keras half."""

import os

# Before TensorFlow is imported: quiet logs, and the two cores that the tests are planned for.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "2")
os.environ.setdefault("TF_NUM_INTEROP_THREADS", "2")
