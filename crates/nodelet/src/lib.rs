//! nodelet.
