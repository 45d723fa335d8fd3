package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/grafana/grafana-foundation-sdk/go/bargauge"
	"github.com/grafana/grafana-foundation-sdk/go/cog"
	"github.com/grafana/grafana-foundation-sdk/go/dashboard"
	"github.com/grafana/grafana-foundation-sdk/go/heatmap"
	"github.com/grafana/grafana-foundation-sdk/go/prometheus"
	"github.com/grafana/grafana-foundation-sdk/go/stat"
	"github.com/grafana/grafana-foundation-sdk/go/statetimeline"
	"github.com/grafana/grafana-foundation-sdk/go/table"
	"github.com/grafana/grafana-foundation-sdk/go/timeseries"
)

// Registers the types of panels and queries for strict decoding.
func TestMain(tests *testing.M) {
	runtime := cog.NewRuntime()
	runtime.RegisterPanelcfgVariant(bargauge.VariantConfig())
	runtime.RegisterPanelcfgVariant(heatmap.VariantConfig())
	runtime.RegisterPanelcfgVariant(stat.VariantConfig())
	runtime.RegisterPanelcfgVariant(statetimeline.VariantConfig())
	runtime.RegisterPanelcfgVariant(table.VariantConfig())
	runtime.RegisterPanelcfgVariant(timeseries.VariantConfig())
	runtime.RegisterDataqueryVariant(prometheus.VariantConfig())
	os.Exit(tests.Run())
}

func TestFilesMatchTheSource(t *testing.T) {
	for file, make := range dashboards {
		made, err := render(make)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(read(t, file), made) {
			t.Errorf("%s is out of date: run `go run .` in the folder grafana", file)
		}
	}
}

func TestDashboardsConformToGrafanasTypes(t *testing.T) {
	for file := range dashboards {
		if _, err := decode(read(t, file)); err != nil {
			t.Errorf("%s: %v", file, err)
		}
	}
}

func TestUnknownOptionsAreRefused(t *testing.T) {
	for _, broken := range []string{`"reduceOptions"`, `"legendFormat"`, `"schemaVersion"`, `"gridPos"`} {
		text := strings.ReplaceAll(string(read(t, "dashboards/overview.json")), broken, `"unknownOption"`)
		if _, err := decode([]byte(text)); err == nil {
			t.Errorf("renaming %s is not detected", broken)
		}
	}
}

func TestEveryPanelHasTitleDescriptionAndUnit(t *testing.T) {
	for file := range dashboards {
		for _, problem := range undescribed(panels(t, read(t, file))) {
			t.Errorf("%s: %s", file, problem)
		}
	}
}

func TestPanelWithoutTitleDescriptionOrUnitIsReported(t *testing.T) {
	for _, broken := range []string{`"description": "Whether`, `"unit": "percentunit"`, `"title": "Last batch"`} {
		key := strings.SplitN(broken, ":", 2)[0]
		text := strings.ReplaceAll(string(read(t, "dashboards/target.json")), broken, key+`: "", "was`+broken[1:])
		if len(undescribed(loosely(t, text))) == 0 {
			t.Errorf("a panel without %s is not reported", broken)
		}
	}
}

// Otherwise a rollout would split a window in two and show each target twice.
func TestCountersAreSummedOverInstances(t *testing.T) {
	summed := regexp.MustCompile(`sum (without \(instance, pod[^)]*\)|by \(le\)) \(increase\(`)
	for file := range dashboards {
		for _, panel := range panels(t, read(t, file)) {
			for _, one := range panel.Targets {
				query := one.(*prometheus.Dataquery)
				if strings.Count(query.Expr, "increase(") != len(summed.FindAllString(query.Expr, -1)) {
					t.Errorf("%s: %s: %s", file, *panel.Title, query.Expr)
				}
			}
		}
	}
}

func TestPanelsDoNotOverlap(t *testing.T) {
	for file := range dashboards {
		taken := map[string]string{}
		for _, panel := range panels(t, read(t, file)) {
			place := panel.GridPos
			if place.X+place.W > 24 {
				t.Errorf("%s: %s exceeds the width of the dashboard", file, *panel.Title)
			}
			for x := place.X; x < place.X+place.W; x++ {
				for y := place.Y; y < place.Y+place.H; y++ {
					cell := fmt.Sprint(x, ",", y)
					if other := taken[cell]; other != "" {
						t.Fatalf("%s: %s overlaps %s", file, *panel.Title, other)
					}
					taken[cell] = *panel.Title
				}
			}
		}
	}
}

func read(t *testing.T, file string) []byte {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// The strict decoder reports problems, but it returns an error even if there are none, and drops the decoded value. The
// lenient decoder therefore returns the value.
func decode(text []byte) (dashboard.Dashboard, error) {
	var strict, decoded dashboard.Dashboard
	if err := strict.UnmarshalJSONStrict(text); err != nil && err.Error() != "" {
		return decoded, err
	}
	if err := json.Unmarshal(text, &decoded); err != nil {
		return decoded, err
	}
	return decoded, decoded.Validate()
}

func panels(t *testing.T, text []byte) []dashboard.Panel {
	t.Helper()
	decoded, err := decode(text)
	if err != nil {
		t.Fatal(err)
	}
	return panelsOf(decoded)
}

// The panels of a dashboard that may contain an unknown key.
func loosely(t *testing.T, text string) []dashboard.Panel {
	t.Helper()
	var decoded dashboard.Dashboard
	if err := json.Unmarshal([]byte(text), &decoded); err != nil {
		t.Fatal(err)
	}
	return panelsOf(decoded)
}

func panelsOf(decoded dashboard.Dashboard) []dashboard.Panel {
	var panels []dashboard.Panel
	for _, one := range decoded.Panels {
		if one.Panel != nil {
			panels = append(panels, *one.Panel)
		}
	}
	if len(panels) < 10 {
		panic("a dashboard has fewer than ten panels: were some not decoded?")
	}
	return panels
}

// Panels without a title, a description or a unit.
func undescribed(panels []dashboard.Panel) []string {
	var problems []string
	for _, panel := range panels {
		if panel.Title == nil || *panel.Title == "" {
			problems = append(problems, fmt.Sprintf("panel %d has no title", *panel.Id))
			continue
		}
		if panel.Description == nil || *panel.Description == "" {
			problems = append(problems, *panel.Title+" has no description")
		}
		if unit(panel) == "" {
			problems = append(problems, *panel.Title+" has no unit")
		}
	}
	return problems
}

func unit(panel dashboard.Panel) string {
	if options, is := panel.Options.(*heatmap.Options); is && options.YAxis.Unit != nil {
		return *options.YAxis.Unit
	}
	if panel.FieldConfig == nil || panel.FieldConfig.Defaults.Unit == nil {
		return ""
	}
	return *panel.FieldConfig.Defaults.Unit
}
