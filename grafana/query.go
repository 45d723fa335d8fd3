package main

import (
	"fmt"
	"strings"

	"github.com/grafana/grafana-foundation-sdk/go/cog"
	"github.com/grafana/grafana-foundation-sdk/go/cog/variants"
	"github.com/grafana/grafana-foundation-sdk/go/common"
	"github.com/grafana/grafana-foundation-sdk/go/prometheus"
)

const prefix = "livekit_canary_"

// The states of a target, from the one that says least to the worst.
var stateNames = []string{"unknown", "healthy", "suspect", "failing"}

// The steps before an agent joins.
const stepsBeforeAgent = `span=~"room_create|signal|media|publish|dispatch"`

// A query and the name of its series; in a table, the name of the column.
type query struct {
	expr string
	name string
}

// Sums to one series per target, and per label that the scrape configuration adds, such as region. The sum drops the labels
// that change with a restart or a rollout: otherwise these would split a window in two.
func sum(expr string, over ...string) string {
	return aggregate("sum", expr, over)
}

// The same for gauges, for which an old and a new instance may both have a series for a while.
func latest(name, matchers string) string {
	return aggregate("max", prefix+name+selector(matchers), nil)
}

func aggregate(how, expr string, over []string) string {
	labels := append([]string{"instance", "pod"}, over...)
	return fmt.Sprintf("%s without (%s) (%s)", how, strings.Join(labels, ", "), expr)
}

// The label matchers of every series, with the chosen targets.
func selector(matchers string) string {
	if matchers != "" {
		matchers = ", " + matchers
	}
	return `{target=~"$target"` + matchers + `}`
}

// The increase of a counter in the window.
func growth(name, matchers, window string) string {
	return fmt.Sprintf("increase(%s%s%s[%s])", prefix, name, selector(matchers), window)
}

// The increase of a counter that has a purpose, over scheduled batches: the others run when something is wrong.
func scheduled(name, matchers, window string, over ...string) string {
	if matchers != "" {
		matchers += ", "
	}
	return sum(growth(name, matchers+`purpose="scheduled"`, window), append([]string{"purpose"}, over...)...)
}

// The increase of a counter in the same window of the day before.
func growthYesterday(name, window string) string {
	return fmt.Sprintf("increase(%s%s%s[%s] offset 1d)", prefix, name, selector(""), window)
}

// The share of eligible probes that were good. It has no value if no probe was eligible: the level is unknown then.
func serviceLevel(matchers, window string) string {
	return fmt.Sprintf("%s\n/ (%s > 0)",
		sum(growth("slo_good_total", matchers, window), "in_incident"),
		sum(growth("slo_eligible_total", matchers, window), "in_incident"))
}

// A series that the recording rules hold. They count over the SLO window: a panel that did so itself would take seconds for
// each target.
func recorded(name, matchers string) string {
	return "livekit_canary:" + name + selector(matchers)
}

// The share of eligible probes that were good over the SLO window.
func recordedLevel() string {
	return recorded("slo_good:slo_window", "") + "\n/ (" + recorded("slo_eligible:slo_window", "") + " > 0)"
}

// With fewer eligible probes in the SLO window, one failed room would look like a missed objective.
const enoughRooms = "> 99.5"

// 1 if no eligible probe failed, 0 if the objective is just met, negative if it is missed, and never below -1.
func budgetLeft(matchers string) string {
	return fmt.Sprintf("clamp_min(%s, -1)\nand %s %s",
		recorded("slo_error_budget_left:ratio", matchers), recorded("slo_eligible:slo_window", matchers), enoughRooms)
}

// A quantile; no value instead of NaN if there are no observations.
func quantile(share, name, matchers string, over ...string) string {
	return quantileOf(share, sum(growth(name+"_bucket", matchers, "$window"), over...))
}

// The p90 of the day before, at the same time of day.
func yesterday(name string, over ...string) query {
	buckets := sum(growthYesterday(name+"_bucket", "$window"), over...)
	return query{quantileOf("0.9", buckets), "{{target}} p90 yesterday"}
}

func quantileOf(share, buckets string) string {
	return fmt.Sprintf("histogram_quantile(%s, %s) >= 0", share, buckets)
}

// Drops a gauge without a value, which is NaN.
func known(expr string) string {
	return expr + " > -Inf"
}

// The time since the instant that a gauge holds.
func ago(name string) string {
	return known("time() - " + latest(name, ""))
}

// The time until the instant that a gauge holds.
func until(name string) string {
	return known(latest(name, "") + " - time()")
}

// A quantile of a histogram whose values can be negative; no value instead of NaN if there are no observations.
func signedQuantile(share, name string) string {
	return known(fmt.Sprintf("histogram_quantile(%s, %s)", share, sum(growth(name+"_bucket", "", "$window"))))
}

// The share of observations above zero. Prometheus 3 writes the bound 0 of a bucket as 0.0.
func aboveZero(name string) string {
	bucket := func(le string) string {
		return sum(growth(name+"_bucket", le, "$window"), "le")
	}
	return fmt.Sprintf("1 - %s\n/ (%s > 0)", bucket(`le=~"0|0.0"`), bucket(`le="+Inf"`))
}

// Only quantiles that are meaningful for few samples: the p99 of a dozen samples is just the slowest one.
func quantiles(name, matchers string, over ...string) []query {
	return []query{
		{quantile("0.5", name, matchers, over...), "{{target}} p50"},
		{quantile("0.9", name, matchers, over...), "{{target}} p90"},
	}
}

// The upper bound of the bucket that contains the slowest observation.
func slowest(name, matchers string, over ...string) query {
	return query{quantile("1", name, matchers, over...), "{{target}} slowest"}
}

// All rooms of scheduled batches that ended, as the total for failures.
func probes() query {
	return query{scheduled("probes_total", "", "$window"), "{{target}} all"}
}

// All rooms that ended, as the total for what every batch counts.
func allProbes() query {
	return query{sum(growth("probes_total", "", "$window"), "purpose"), "{{target}} all"}
}

// Only reasons that occurred: every target has a series for each of about twenty reasons.
func failures(matchers, name string, over ...string) query {
	return query{scheduled("probe_failures_total", matchers, "$window", over...) + " > 0", name}
}

// All turns of the caller, as the total for their results.
func turns() query {
	return query{sum(growth("caller_turns_total", "", "$window"), "result"), "{{target}} all"}
}

func turnsByResult(name string) query {
	return query{sum(growth("caller_turns_total", "", "$window")), name}
}

// The objective of a service level, unless the settings rule it out.
func objective(matchers string) string {
	return known(latest("slo_objective_ratio", matchers))
}

// The longest delay that counts as good, unless the settings rule the service level out.
func threshold(matchers string) string {
	return known(latest("slo_threshold_seconds", matchers))
}

func rejections(name string) query {
	return query{sum(growth("plan_limit_rejections_total", "", "$window")) + " > 0", name}
}

func batches() query {
	return query{scheduled("batches_total", "", "$window", "result"), "{{target}} batches"}
}

// The state of each target as a number: 0 unknown, 1 healthy, 2 suspect, 3 failing.
func state() query {
	numbered := make([]string, 0, len(stateNames))
	for number, name := range stateNames {
		is := fmt.Sprintf(`state="%s"`, name)
		numbered = append(numbered, fmt.Sprintf("(%starget_state%s == 1) * %d", prefix, selector(is), number))
	}
	return query{aggregate("max", strings.Join(numbered, " or "), []string{"state"}), "{{target}}"}
}

func skipped(name string) query {
	return query{sum(growth("batches_skipped_total", "", "$window")) + " > 0", name}
}

func ranges(queries []query) []cog.Builder[variants.Dataquery] {
	return each(queries, func(one *prometheus.DataqueryBuilder) { one.Range() })
}

func instants(queries []query) []cog.Builder[variants.Dataquery] {
	return each(queries, func(one *prometheus.DataqueryBuilder) { one.Instant() })
}

func columns(queries []query) []cog.Builder[variants.Dataquery] {
	return each(queries, func(one *prometheus.DataqueryBuilder) {
		one.Instant().Format(prometheus.PromQueryFormatTable)
	})
}

func heat(expr string) []cog.Builder[variants.Dataquery] {
	return each([]query{{expr, "{{le}}"}}, func(one *prometheus.DataqueryBuilder) {
		one.Range().Format(prometheus.PromQueryFormatHeatmap)
	})
}

func each(queries []query, finish func(*prometheus.DataqueryBuilder)) []cog.Builder[variants.Dataquery] {
	var built []cog.Builder[variants.Dataquery]
	for index, one := range queries {
		builder := prometheus.NewDataqueryBuilder().
			RefId(refId(index)).
			Datasource(datasource()).
			EditorMode(prometheus.QueryEditorModeCode).
			Expr(one.expr).
			LegendFormat(one.name)
		finish(builder)
		built = append(built, builder)
	}
	return built
}

func refId(index int) string {
	return string(rune('A' + index))
}

func datasource() common.DataSourceRef {
	return common.DataSourceRef{Type: cog.ToPtr("prometheus"), Uid: cog.ToPtr("${datasource}")}
}
