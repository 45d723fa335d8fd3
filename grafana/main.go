// Writes the dashboards that Grafana loads. Run `go run .` in this folder after a change; a test compares the files with
// the output.
package main

import (
	"encoding/json"
	"log"
	"os"
	"strings"

	"github.com/grafana/grafana-foundation-sdk/go/cog"
	"github.com/grafana/grafana-foundation-sdk/go/dashboard"
)

// The schema of Grafana 11, the oldest that has every option used here. Later versions migrate it when they load it.
const schemaVersion = 39

// The dashboards by their files.
var dashboards = map[string]func() (dashboard.Dashboard, error){
	"dashboards/overview.json": overview,
	"dashboards/target.json":   target,
}

func main() {
	log.SetFlags(0)
	for file, make := range dashboards {
		text, err := render(make)
		if err == nil {
			err = os.WriteFile(file, text, 0o644)
		}
		if err != nil {
			log.Fatalf("%s: %v", file, err)
		}
	}
}

func render(make func() (dashboard.Dashboard, error)) ([]byte, error) {
	made, err := make()
	if err != nil {
		return nil, err
	}
	made.SchemaVersion = schemaVersion
	identify(made.Panels)
	text, err := json.MarshalIndent(made, "", "  ")
	// Go escapes characters that matter in HTML. Without these escapes, queries are readable in a diff.
	readable := strings.NewReplacer(`\u003e`, ">", `\u003c`, "<", `\u0026`, "&").Replace(string(text))
	return []byte(readable + "\n"), err
}

// Numbers the panels, because links and alerts refer to a panel by its number.
func identify(panels []dashboard.PanelOrRowPanel) {
	for index, one := range panels {
		id := uint32(index + 1)
		if one.Panel != nil {
			one.Panel.Id = cog.ToPtr(id)
		} else {
			one.RowPanel.Id = id
		}
	}
}
