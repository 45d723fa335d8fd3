package main

import (
	"fmt"
	"slices"

	"github.com/grafana/grafana-foundation-sdk/go/bargauge"
	"github.com/grafana/grafana-foundation-sdk/go/cog"
	"github.com/grafana/grafana-foundation-sdk/go/common"
	"github.com/grafana/grafana-foundation-sdk/go/dashboard"
	"github.com/grafana/grafana-foundation-sdk/go/heatmap"
	"github.com/grafana/grafana-foundation-sdk/go/stat"
	"github.com/grafana/grafana-foundation-sdk/go/statetimeline"
	"github.com/grafana/grafana-foundation-sdk/go/table"
	"github.com/grafana/grafana-foundation-sdk/go/timeseries"
	"github.com/grafana/grafana-foundation-sdk/go/units"
)

// The texts and the size of a panel.
type about struct {
	title string
	// What the panel shows, for which rooms, and what to conclude.
	description string
	unit        string
	// The width in 24ths of the dashboard, and the height in rows of about 36 pixels.
	width, height uint32
}

const (
	// A service level, an objective or a share.
	share = units.PercentUnit
	count = units.Short
)

// Lines over time. Thresholds, objectives and the day before are dashed.
func lines(about about, queries ...query) *timeseries.PanelBuilder {
	return signedLines(about, queries...).Min(0)
}

// Lines whose values can be negative.
func signedLines(about about, queries ...query) *timeseries.PanelBuilder {
	return timeseries.NewPanelBuilder().
		Title(about.title).Description(about.description).Unit(about.unit).
		Span(about.width).Height(about.height).
		Datasource(datasource()).
		Targets(ranges(queries)).
		LineWidth(1).
		// A single value between two gaps is shown as a point.
		ShowPoints(common.VisibilityModeAuto).
		ColorScheme(dashboard.NewFieldColorBuilder().Mode(dashboard.FieldColorModeIdPaletteClassicByName)).
		Legend(common.NewVizLegendOptionsBuilder().
			ShowLegend(true).
			DisplayMode(common.LegendDisplayModeList).
			Placement(common.LegendPlacementBottom)).
		Tooltip(common.NewVizTooltipOptionsBuilder().
			Mode(common.TooltipDisplayModeMulti).
			Sort(common.SortOrderDescending)).
		OverrideByRegexp("/(threshold|objective|yesterday)$/", []dashboard.DynamicConfigValue{
			{Id: "custom.lineStyle", Value: map[string]any{"fill": "dash", "dash": []int{8, 8}}},
			{Id: "custom.lineWidth", Value: 2},
		})
}

// Stacked counts over time. The first query is their total, a dotted line behind them.
func counts(about about, whole query, parts ...query) *timeseries.PanelBuilder {
	return lines(about, append([]query{whole}, parts...)...).
		FillOpacity(60).
		Stacking(common.NewStackingConfigBuilder().Mode(common.StackingModeNormal).Group("A")).
		Decimals(0).
		OverrideByQuery("A", []dashboard.DynamicConfigValue{
			{Id: "custom.stacking", Value: map[string]any{"mode": "none", "group": "whole"}},
			{Id: "custom.fillOpacity", Value: 0},
			{Id: "custom.lineWidth", Value: 1},
			{Id: "custom.lineStyle", Value: map[string]any{"fill": "dot", "dash": []int{2, 6}}},
		})
}

// The distribution of a delay over time.
func heatOf(about about, name string) *heatmap.PanelBuilder {
	return heatmap.NewPanelBuilder().
		Title(about.title).Description(about.description).
		Span(about.width).Height(about.height).
		Datasource(datasource()).
		Targets(heat("sum by (le) (" + growth(name+"_bucket", "", "$window") + ")")).
		Calculate(false).
		// Empty cells stay empty.
		FilterValues(heatmap.NewFilterValueRangeBuilder().Le(1e-9)).
		Color(heatmap.NewHeatmapColorOptionsBuilder().
			Mode(heatmap.HeatmapColorModeScheme).
			Scheme("Oranges").
			Scale(heatmap.HeatmapColorScaleExponential).
			Exponent(0.5).
			Steps(64)).
		CellGap(1).
		CellValues(heatmap.NewCellValuesBuilder().Unit(count).Decimals(0)).
		YAxis(heatmap.NewYAxisConfigBuilder().Unit(about.unit).AxisPlacement(common.AxisPlacementLeft)).
		Tooltip(heatmap.NewHeatmapTooltipBuilder().Mode(common.TooltipDisplayModeSingle).YHistogram(true)).
		ShowLegend()
}

// The result of the last batch of each target over time, in words.
func states(about about, one query) *statetimeline.PanelBuilder {
	failed, degraded, ok := "failed", "degraded", "ok"
	mappings := dashboard.ValueMap{Type: dashboard.MappingTypeValueToText, Options: map[string]dashboard.ValueMappingResult{
		"0": {Text: &failed, Color: cog.ToPtr("red")},
		"1": {Text: &ok, Color: cog.ToPtr("green")},
	}}
	between := dashboard.RangeMap{Type: dashboard.MappingTypeRangeToText, Options: dashboard.DashboardRangeMapOptions{
		From:   cog.ToPtr(0.0),
		To:     cog.ToPtr(1.0),
		Result: dashboard.ValueMappingResult{Text: &degraded, Color: cog.ToPtr("orange")},
	}}
	// The first mapping that fits decides.
	return timeline(about, one).Mappings([]dashboard.ValueMapping{{ValueMap: &mappings}, {RangeMap: &between}})
}

// The state of each target over time.
func targetStates(width, height uint32) *statetimeline.PanelBuilder {
	colours := []string{"text", "green", "orange", "red"}
	results := map[string]dashboard.ValueMappingResult{}
	for number, name := range stateNames {
		results[fmt.Sprint(number)] = dashboard.ValueMappingResult{Text: cog.ToPtr(name), Color: cog.ToPtr(colours[number])}
	}
	return timeline(about{
		"State",
		"What the last rooms say. unknown: no verdict on the agent, or paused. suspect: a room failed, and more rooms are to " +
			"confirm it. failing: an incident is open, and a page has left.",
		count, width, height,
	}, state()).
		Mappings([]dashboard.ValueMapping{{ValueMap: &dashboard.ValueMap{
			Type: dashboard.MappingTypeValueToText, Options: results,
		}}})
}

// The incidents that are open, and what the canary knows of them.
func openIncidents(width, height uint32) *table.PanelBuilder {
	return rows(about{
		"Open incidents",
		"Outages that last: the most frequent reason, the share of failed rooms since the begin, and what differs between failed " +
			"and good rooms. Empty without an outage.",
		count, width, height,
	}, []string{"target", "reason", "share", "differs", "url"},
		column{query: query{expr: latest("incident_info", "")}, unit: count}).
		OverrideByName("url", []dashboard.DynamicConfigValue{
			{Id: "links", Value: []map[string]any{
				{"title": "Show the incident on the canary", "targetBlank": true, "url": "${__value.raw}"},
			}},
		})
}

func timeline(about about, one query) *statetimeline.PanelBuilder {
	return statetimeline.NewPanelBuilder().
		Title(about.title).Description(about.description).Unit(about.unit).
		Span(about.width).Height(about.height).
		Datasource(datasource()).
		Targets(ranges([]query{one})).
		MergeValues(true).
		ShowValue(common.VisibilityModeNever).
		RowHeight(0.9).
		Legend(common.NewVizLegendOptionsBuilder().
			ShowLegend(true).
			DisplayMode(common.LegendDisplayModeList).
			Placement(common.LegendPlacementBottom)).
		Tooltip(common.NewVizTooltipOptionsBuilder().Mode(common.TooltipDisplayModeSingle)).
		Thresholds(steps("text"))
}

// The latest value of each series, as a big number.
func number(about about, queries ...query) *stat.PanelBuilder {
	return stat.NewPanelBuilder().
		Title(about.title).Description(about.description).Unit(about.unit).
		Span(about.width).Height(about.height).
		Datasource(datasource()).
		Targets(instants(queries)).
		ReduceOptions(lastOfEach()).
		GraphMode(common.BigValueGraphModeNone).
		ColorMode(common.BigValueColorModeValue).
		JustifyMode(common.BigValueJustifyModeAuto).
		TextMode(common.BigValueTextModeAuto).
		Orientation(common.VizOrientationAuto).
		Thresholds(steps("text"))
}

// A bar from 0 to 1.
func fill(about about, queries ...query) *bargauge.PanelBuilder {
	return bars(about, queries...).
		ShowUnfilled(true).
		Max(1).
		Thresholds(steps("green", 0.8, "orange", 1.0, "red"))
}

// A bar from 0 for each series. That of a negative value is empty.
func bars(about about, queries ...query) *bargauge.PanelBuilder {
	return bargauge.NewPanelBuilder().
		Title(about.title).Description(about.description).Unit(about.unit).
		Span(about.width).Height(about.height).
		Datasource(datasource()).
		Targets(instants(queries)).
		ReduceOptions(lastOfEach()).
		Orientation(common.VizOrientationHorizontal).
		DisplayMode(common.BarGaugeDisplayModeBasic).
		ValueMode(common.BarGaugeValueModeColor).
		Min(0).
		Thresholds(steps("blue"))
}

func lastOfEach() cog.Builder[common.ReduceDataOptions] {
	return common.NewReduceDataOptionsBuilder().Values(false).Calcs([]string{"lastNotNull"}).Fields("")
}

// A column of a table, in addition to the labels. A column without a name is hidden.
type column struct {
	query
	unit string
	look []dashboard.DynamicConfigValue
}

// A row for each set of labels: the labels named, then the columns.
func rows(about about, labels []string, columns_ ...column) *table.PanelBuilder {
	// A lone query's values are called Value, those of several Value #A and so on.
	names := map[string]string{"Value": columns_[0].name}
	order := map[string]int{"Value": len(labels)}
	shown := "Value.*"
	hidden := map[string]bool{}
	queries := make([]query, 0, len(columns_))
	for index, label := range labels {
		order[label] = index
		shown += "|" + label
	}
	for index, one := range columns_ {
		value := "Value #" + refId(index)
		if one.name == "" {
			hidden["Value"], hidden[value] = true, true
		}
		names[value] = one.name
		order[value] = len(labels) + index
		queries = append(queries, one.query)
	}
	built := table.NewPanelBuilder().
		Title(about.title).Description(about.description).Unit(about.unit).
		Span(about.width).Height(about.height).
		Datasource(datasource()).
		Targets(columns(queries)).
		WithTransformation(transformation("merge", map[string]any{})).
		// Keeps those labels of the scrape configuration that distinguish places.
		WithTransformation(transformation("filterFieldsByName", map[string]any{
			"include": map[string]any{"pattern": "^(" + shown + "|region|env|cluster)$"},
		})).
		WithTransformation(transformation("organize", map[string]any{
			"renameByName": names, "indexByName": order, "excludeByName": hidden,
		})).
		Filterable(false).
		Footer(common.NewTableFooterOptionsBuilder().Show(false).Reducer([]string{})).
		Thresholds(steps("text"))
	for _, one := range columns_ {
		if one.name == "" {
			continue
		}
		look := append([]dashboard.DynamicConfigValue{{Id: "unit", Value: one.unit}}, one.look...)
		built.OverrideByName(one.name, look)
	}
	return built.OverrideByName("target", []dashboard.DynamicConfigValue{
		{Id: "links", Value: []map[string]any{
			{"title": "Show this target", "url": targetUrl("${__value.raw}")},
			{"title": "Show its batches on the canary", "targetBlank": true,
				"url": "${status_page:raw}/api/v1/batches?target=${__value.raw}"},
		}},
	})
}

// The columns of service levels over the SLO window; `more` precede the counts of rooms and batches.
func levels(more ...column) []column {
	return slices.Concat([]column{
		{query{recordedLevel(), "Service level"}, share, decimals(2)},
		{query{objective(""), "Objective"}, share, decimals(2)},
		{query{budgetLeft(""), "Error budget left"}, share,
			append(coloured("color-text", "red", 0.0, "orange", 0.25, "green"), decimals(0)...)},
	}, more, []column{
		{query{recorded("slo_eligible:slo_window", ""), "Rooms"}, count, decimals(0)},
		{query{recorded("slo_bad_batches:slo_window", ""), "Bad batches"}, count, decimals(0)},
	})
}

func batchesInWindow(width, height uint32, name string) *stat.PanelBuilder {
	return number(about{
		"Batches in the window",
		"The number of batches in the chosen window. With fewer than four, a single room looks like a trend: choose a longer window.",
		count, width, height,
	}, query{batches().expr, name}).
		Decimals(0).
		Thresholds(steps("orange", 3.5, "green"))
}

func decimals(places int) []dashboard.DynamicConfigValue {
	return []dashboard.DynamicConfigValue{{Id: "decimals", Value: places}}
}

func transformation(id string, options map[string]any) dashboard.DataTransformerConfig {
	return dashboard.DataTransformerConfig{Id: id, Options: options}
}

// Colours a table cell by the step of its value.
func coloured(mode string, values ...any) []dashboard.DynamicConfigValue {
	return []dashboard.DynamicConfigValue{
		{Id: "custom.cellOptions", Value: map[string]any{"type": mode}},
		{Id: "thresholds", Value: built(steps(values...))},
	}
}

// The base colour, followed by pairs of a value and the colour from that value on.
func steps(values ...any) cog.Builder[dashboard.ThresholdsConfig] {
	thresholds := []dashboard.Threshold{{Color: values[0].(string)}}
	for index := 1; index < len(values); index += 2 {
		value := values[index].(float64)
		thresholds = append(thresholds, dashboard.Threshold{Value: &value, Color: values[index+1].(string)})
	}
	return dashboard.NewThresholdsConfigBuilder().Mode(dashboard.ThresholdsModeAbsolute).Steps(thresholds)
}

func built(thresholds cog.Builder[dashboard.ThresholdsConfig]) dashboard.ThresholdsConfig {
	made, err := thresholds.Build()
	if err != nil {
		panic(fmt.Sprintf("the thresholds in this file must be valid: %v", err))
	}
	return made
}

// Shows words for 0 and 1; green is the good one.
func words(zero, one string, oneIsGood bool) []dashboard.ValueMapping {
	colours := map[bool]string{true: "green", false: "red"}
	mapping := dashboard.ValueMap{Type: dashboard.MappingTypeValueToText, Options: map[string]dashboard.ValueMappingResult{
		"0": {Text: &zero, Color: cog.ToPtr(colours[!oneIsGood])},
		"1": {Text: &one, Color: cog.ToPtr(colours[oneIsGood])},
	}}
	return []dashboard.ValueMapping{{ValueMap: &mapping}}
}
