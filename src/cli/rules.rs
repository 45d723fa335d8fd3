//! `rules`: prints Prometheus rules for the settings.

use chrono::Utc;

use super::{Exit, RulesArgs, print};
use crate::config::RawConfig;
use crate::guard::max_batch_duration;
use crate::rules;

pub(super) fn run(args: &RulesArgs) -> anyhow::Result<Exit> {
    let draft = RawConfig::read(args.config.as_deref(), super::environment())?;
    let config = draft.without_credentials().validate()?;
    print(&rules::render(&config, max_batch_duration, Utc::now()))?;
    Ok(Exit::Ok)
}
