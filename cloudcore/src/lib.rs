//! cloudcore: watches the apiserver and keeps edge nodes in step with it.
