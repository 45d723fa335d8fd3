package main

import (
	"fmt"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/grafana/grafana-foundation-sdk/go/dashboard"
	"github.com/grafana/grafana-foundation-sdk/go/prometheus"
)

// A query of a panel as Grafana sends it for a chosen target.
type panelQuery struct {
	panel, ref, expr string
	instant          bool
	annotation       bool
	target           string
}

func (one panelQuery) String() string {
	return fmt.Sprintf("%s, %s of %q: %s", one.target, one.ref, one.panel, one.expr)
}

// The result that a query must have.
type expectation int

const (
	// At least one value that is a number.
	values expectation = iota
	// Never a value.
	nothing
	// Either.
	anything
)

// The end of a query that shows only problems, and therefore nothing for a healthy target.
const onlyProblems = "> 0"

var (
	// Queries that cover only rooms with an agent.
	ofAgent = regexp.MustCompile(`(?s)histogram_quantile.*(agent_|first_speech|reply|word_error|yield)|audio_packets|word_error`)
	// Queries about replies, which are due only if there is an agent.
	ofReply = regexp.MustCompile(`slo_good_total.*sli="reply"`)
	// Queries about interruptions, which only the caller of the healthy target makes.
	ofInterruption = regexp.MustCompile(`yield_delay`)
)

func (one panelQuery) expected() expectation {
	shows := strings.HasSuffix(one.expr, onlyProblems)
	switch {
	case one.annotation:
		// Whether an alert fires depends on the length of the run.
		return anything
	case strings.Contains(one.expr, "incident_info") && one.target == healthy:
		return nothing
	case strings.Contains(one.expr, "incident_info"):
		// Whether an incident opens depends on the length of the run.
		return anything
	case strings.Contains(one.expr, "offset 1d"):
		return nothing
	case shows && one.target == healthy:
		return nothing
	case shows && one.target == outage:
		// The outage causes only some kinds of failures.
		return anything
	case one.target == outage && (ofAgent.MatchString(one.expr) || ofReply.MatchString(one.expr)):
		return nothing
	case one.target == failing && ofInterruption.MatchString(one.expr):
		return nothing
	default:
		return values
	}
}

func TestEveryQueryHasTheExpectedValues(t *testing.T) {
	for version, stack := range start(t) {
		t.Run(version, func(t *testing.T) {
			// Each fault occurs only a few times, so both versions must run at the same time.
			t.Parallel()
			stack.finds(t)
		})
	}
}

func (stack stack) finds(t *testing.T) {
	var queries []panelQuery
	for file := range dashboards {
		queries = append(queries, stack.queries(t, read(t, file))...)
	}
	began := time.Now()
	missing := stack.unmet(t, queries, 3*time.Minute)
	for _, one := range missing {
		t.Errorf("no value for %s", one)
	}
	t.Logf("%d queries in %.0f s, %d without a value", len(queries), time.Since(began).Seconds(), len(missing))
	if t.Failed() {
		return
	}

	// The same check must fail if a series or a label had another name.
	for _, renamed := range [][2]string{
		{"agent_join_delay_seconds_bucket", "agent_joined_delay_seconds_bucket"},
		{"batches_total", "batches_run_total"},
		{`sli=\"join\"`, `sli=\"joined\"`},
		{`sli=\"reply\"`, `sli=\"replied\"`},
		{"reply_delay_seconds_bucket", "replied_delay_seconds_bucket"},
	} {
		text := strings.ReplaceAll(string(read(t, "dashboards/overview.json")), renamed[0], renamed[1])
		if len(stack.unmet(t, stack.queries(t, []byte(text)), 0)) == 0 {
			t.Errorf("a query without %s is not detected", renamed[0])
		}
	}
}

// Repeats the queries until each has had its expected result, and returns those that never had.
func (stack stack) unmet(t *testing.T, queries []panelQuery, within time.Duration) []panelQuery {
	t.Helper()
	waiting := slices.Clone(queries)
	for deadline := time.Now().Add(within); ; {
		waiting = slices.DeleteFunc(waiting, func(one panelQuery) bool { return stack.met(t, one) })
		unmet := slices.DeleteFunc(slices.Clone(waiting), func(one panelQuery) bool { return one.expected() != values })
		if len(unmet) == 0 || time.Now().After(deadline) {
			return unmet
		}
		time.Sleep(time.Second)
	}
}

// Whether a query is done. A query that must have no values is never done: it is checked until the end.
func (stack stack) met(t *testing.T, one panelQuery) bool {
	t.Helper()
	found, err := stack.values(one)
	if err != nil {
		t.Fatalf("%s: %v", one, err)
	}
	if one.expected() == nothing && len(found) > 0 {
		t.Fatalf("%v for %s", found, one)
	}
	return one.expected() == values && slices.ContainsFunc(found, func(value string) bool { return value != "NaN" })
}

// The last value of each series.
func (stack stack) values(one panelQuery) ([]string, error) {
	var data struct {
		Result []struct {
			Value  [2]any
			Values [][2]any
		}
	}
	now := time.Now()
	path, form := "/api/v1/query", url.Values{"query": {one.expr}}
	if !one.instant {
		path += "_range"
		form.Set("start", fmt.Sprint(now.Add(-time.Minute).Unix()))
		form.Set("end", fmt.Sprint(now.Unix()))
		form.Set("step", "5")
	}
	if err := stack.request(path, form, &data); err != nil {
		return nil, err
	}
	var found []string
	for _, series := range data.Result {
		last := series.Value
		if !one.instant {
			last = series.Values[len(series.Values)-1]
		}
		found = append(found, last[1].(string))
	}
	return found, nil
}

// The value of a variable if all its options are selected.
const all = "(" + failing + "|" + healthy + "|" + outage + ")"

// Every query of a dashboard for each target, and for all targets together if the dashboard allows it.
func (stack stack) queries(t *testing.T, text []byte) []panelQuery {
	t.Helper()
	decoded, err := decode(text)
	if err != nil {
		t.Fatal(err)
	}
	var queries []panelQuery
	for _, target := range []string{healthy, failing, outage, all} {
		chosen := stack.chosen(t, decoded, target)
		if chosen == nil {
			continue
		}
		add := func(title string, query *prometheus.Dataquery) *panelQuery {
			// No test runs for a hundred rooms.
			expr := strings.ReplaceAll(query.Expr, enoughRooms, "> 0.5")
			queries = append(queries, panelQuery{
				panel:   title,
				ref:     *query.RefId,
				expr:    expand(t, expr, chosen),
				instant: query.Instant != nil && *query.Instant,
				target:  target,
			})
			return &queries[len(queries)-1]
		}
		for _, one := range decoded.Annotations.List {
			add(one.Name, one.Target.(*prometheus.Dataquery)).annotation = true
		}
		for _, panel := range panelsOf(decoded) {
			for _, one := range panel.Targets {
				add(*panel.Title, one.(*prometheus.Dataquery))
			}
		}
	}
	return queries
}

// The values of a dashboard's variables for this target; nil if the dashboard can't select it.
func (stack stack) chosen(t *testing.T, decoded dashboard.Dashboard, target string) map[string]string {
	t.Helper()
	chosen := map[string]string{"__range": "60s", "__interval": "15s", "__rate_interval": "1m0s"}
	for _, variable := range decoded.Templating.List {
		switch variable.Type {
		case dashboard.VariableTypeQuery:
			if target == all && !*variable.Multi {
				return nil
			}
			chosen[variable.Name] = target
			options := stack.options(t, expand(t, *variable.Query.String, chosen))
			for _, wanted := range strings.Split(strings.Trim(target, "()"), "|") {
				if !slices.Contains(options, wanted) {
					t.Fatalf("variable %s offers %v, not %s", variable.Name, options, wanted)
				}
			}
		case dashboard.VariableTypeCustom:
			// Several values become the alternatives of a regular expression.
			chosen[variable.Name] = "(" + strings.Join(variable.Current.Value.ArrayOfString, "|") + ")"
			if variable.Current.Value.String != nil {
				chosen[variable.Name] = *variable.Current.Value.String
			}
		}
	}
	return chosen
}

var labelValues = regexp.MustCompile(`^label_values\((.*), (\w+)\)$`)

// The options of a query variable, after the daemon was scraped.
func (stack stack) options(t *testing.T, query string) []string {
	t.Helper()
	parts := labelValues.FindStringSubmatch(query)
	if parts == nil {
		t.Fatalf("%s is not a label_values query", query)
	}
	var options []string
	for deadline := time.Now().Add(30 * time.Second); len(options) == 0 && time.Now().Before(deadline); {
		var data []map[string]string
		err := stack.request("/api/v1/series", url.Values{"match[]": {parts[1]}}, &data)
		for _, labels := range data {
			options = append(options, labels[parts[2]])
		}
		if err != nil || len(options) == 0 {
			time.Sleep(200 * time.Millisecond)
		}
	}
	return options
}

var variable = regexp.MustCompile(`\$(\w+)`)

// Puts the values of variables into a query.
func expand(t *testing.T, query string, chosen map[string]string) string {
	t.Helper()
	return variable.ReplaceAllStringFunc(query, func(name string) string {
		value, known := chosen[name[1:]]
		if !known {
			t.Fatalf("%s in %s is not a variable of the dashboard", name, query)
		}
		return value
	})
}
