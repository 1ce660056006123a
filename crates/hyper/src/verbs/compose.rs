//! `compose`.
use crate::{cli::{ComposeCommand, ComposeFiles}, cluster::Target, error::{Failure, Result}};
pub(crate) async fn run(_target: &Target, _files: &ComposeFiles, _command: ComposeCommand) -> Result<()> {
    Err(Failure::plain("not yet"))
}
