package deploy

import (
	"errors"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"testing"

	monitoring "github.com/prometheus-operator/prometheus-operator/pkg/apis/monitoring/v1"
	"helm.sh/helm/v3/pkg/chart"
	"helm.sh/helm/v3/pkg/chart/loader"
	"helm.sh/helm/v3/pkg/chartutil"
	"helm.sh/helm/v3/pkg/engine"
	"helm.sh/helm/v3/pkg/lint"
	"helm.sh/helm/v3/pkg/lint/support"
	apps "k8s.io/api/apps/v1"
	core "k8s.io/api/core/v1"
	networking "k8s.io/api/networking/v1"
	"sigs.k8s.io/json"
	"sigs.k8s.io/yaml"
)

// The least that a release needs, and all that it can have.
var releases = []string{"least", "full"}

func values(t *testing.T, release string) map[string]any {
	t.Helper()
	values, err := chartutil.ReadValuesFile(filepath.Join("testdata", release+".values.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	return values
}

// What `helm template` prints, by the name of the template.
func template(values map[string]any) (map[string]string, error) {
	chart, err := loader.Load(root + "/deploy/helm/livekit-canary")
	if err != nil {
		return nil, err
	}
	return templateOf(chart, values)
}

func templateOf(chart *chart.Chart, values map[string]any) (map[string]string, error) {
	options := chartutil.ReleaseOptions{Name: "eu", Namespace: "canaries", Revision: 1, IsInstall: true}
	merged, err := chartutil.ToRenderValues(chart, values, options, chartutil.DefaultCapabilities)
	if err != nil {
		return nil, err
	}
	return engine.Render(chart, merged)
}

func render(t *testing.T, values map[string]any) map[string]string {
	t.Helper()
	files, err := template(values)
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// The documents of all templates, in the order of their names, with `# Source:` lines as `helm template` has them.
func manifests(files map[string]string) []string {
	names := make([]string, 0, len(files))
	for name := range files {
		if !strings.HasSuffix(name, "NOTES.txt") && !strings.HasSuffix(name, ".tpl") {
			names = append(names, name)
		}
	}
	sort.Strings(names)
	var documents []string
	for _, name := range names {
		for _, document := range strings.Split("\n"+files[name], "\n---\n") {
			if strings.TrimSpace(document) != "" {
				documents = append(documents, "# Source: "+name+"\n"+strings.TrimSpace(document)+"\n")
			}
		}
	}
	return documents
}

// Decodes a manifest into its type; a field that the type doesn't know is an error.
func decode(document string) (any, error) {
	var kind struct {
		Kind string `json:"kind"`
	}
	if err := yaml.Unmarshal([]byte(document), &kind); err != nil {
		return nil, err
	}
	types := map[string]any{
		"ConfigMap":             &core.ConfigMap{},
		"Deployment":            &apps.Deployment{},
		"Ingress":               &networking.Ingress{},
		"NetworkPolicy":         &networking.NetworkPolicy{},
		"PersistentVolumeClaim": &core.PersistentVolumeClaim{},
		"Pod":                   &core.Pod{},
		"PodMonitor":            &monitoring.PodMonitor{},
		"PrometheusRule":        &monitoring.PrometheusRule{},
		"Service":               &core.Service{},
		"ServiceAccount":        &core.ServiceAccount{},
		"ServiceMonitor":        &monitoring.ServiceMonitor{},
	}
	object, known := types[kind.Kind]
	if !known {
		return nil, os.ErrInvalid
	}
	converted, err := yaml.YAMLToJSONStrict([]byte(document))
	if err != nil {
		return nil, err
	}
	// As the API server decodes, and kubectl before it: upper and lower case differ.
	unknown, err := json.UnmarshalStrict(converted, object)
	return object, errors.Join(append(unknown, err)...)
}

// The one object of this type.
func one[T any](t *testing.T, files map[string]string) *T {
	t.Helper()
	var found []*T
	for _, document := range manifests(files) {
		object, err := decode(document)
		if err != nil {
			t.Fatalf("%v:\n%s", err, document)
		}
		if object, is := object.(*T); is {
			found = append(found, object)
		}
	}
	if len(found) != 1 {
		t.Fatalf("%d objects of one type", len(found))
	}
	return found[0]
}

func TestHelmLintFindsNothing(t *testing.T) {
	for _, release := range releases {
		linted := lint.AllWithKubeVersion(root+"/deploy/helm/livekit-canary", values(t, release), "canaries", nil)
		for _, message := range linted.Messages {
			// An icon is all that it misses.
			if message.Severity > support.InfoSev {
				t.Errorf("%s: %s", release, message)
			}
		}
	}
}

func TestEveryManifestHasOnlyFieldsThatItsTypeKnows(t *testing.T) {
	for _, release := range releases {
		for _, document := range manifests(render(t, values(t, release))) {
			if _, err := decode(document); err != nil {
				t.Errorf("%s: %v:\n%s", release, err, document)
			}
		}
	}
	for _, field := range []string{"prots", "Ports"} {
		if _, err := decode("kind: Service\nspec:\n  " + field + ": []\n"); err == nil {
			t.Errorf("the unknown field %s is not noticed", field)
		}
	}
}

func TestManifestsStayAsTheyAre(t *testing.T) {
	for _, release := range releases {
		with := values(t, release)
		// Those are files of their own, and change with what they show.
		with["dashboards"] = map[string]any{"enabled": false}
		text := strings.Join(manifests(render(t, with)), "---\n")
		file := filepath.Join("testdata", release+".yaml")
		if os.Getenv("UPDATE") != "" {
			write(t, file, text)
		}
		if read(t, file) != text {
			t.Errorf("%s differs; see what `UPDATE=1 go test` changes:\n%s", file, text)
		}
	}
}

func TestOneCanaryAtATimeHasTheTimeToDrainAndNothingToWriteButItsState(t *testing.T) {
	deployment := one[apps.Deployment](t, render(t, values(t, "full")))
	if *deployment.Spec.Replicas != 1 || deployment.Spec.Strategy.Type != apps.RecreateDeploymentStrategyType {
		t.Error("two canaries at once")
	}
	pod := deployment.Spec.Template.Spec
	// config/canary.toml: drain_grace 30s, shutdown_linger 5s, cleanup 10s twice; and what the code adds.
	if *pod.TerminationGracePeriodSeconds < 30+5+2*10+8 {
		t.Error("it is killed while it drains")
	}
	security := pod.Containers[0].SecurityContext
	if !*security.ReadOnlyRootFilesystem || *security.AllowPrivilegeEscalation || !*pod.SecurityContext.RunAsNonRoot {
		t.Error("it may do more than it needs")
	}
	for _, volume := range pod.Volumes {
		if volume.HostPath != nil {
			t.Errorf("volume %s is the host's", volume.Name)
		}
	}
}

func TestTheEnvironmentOfThePodNamesItsCredentials(t *testing.T) {
	deployment := one[apps.Deployment](t, render(t, values(t, "full")))
	container := deployment.Spec.Template.Spec.Containers[0]
	folder := t.TempDir()
	variables := []string{}
	for _, variable := range container.Env {
		// Where the pod has them, a folder of this test has them.
		value := strings.Replace(variable.Value, "/etc/livekit-canary/credentials", folder, 1)
		value = strings.Replace(value, "/etc/livekit-canary/web", folder, 1)
		variables = append(variables, variable.Name+"="+value)
	}
	for _, project := range []string{"main", "eu-west"} {
		if err := os.Mkdir(filepath.Join(folder, project), 0o700); err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(folder, project, "api-key"), "key")
		write(t, filepath.Join(folder, project, "api-secret"), "secret")
	}
	webSecret(t, folder, serverCertificate)
	settings := filepath.Join(folder, "canary.toml")
	write(t, settings, values(t, "full")["settings"].(string))
	output, err := command(binary(t), variables, "check", "--config", settings).CombinedOutput()
	if err != nil {
		t.Errorf("%v\n%s", err, output)
	}
}

func TestReleaseWithoutSettingsIsRefused(t *testing.T) {
	_, err := template(map[string]any{})
	if err == nil || !strings.Contains(err.Error(), "--set-file settings=canary.toml") {
		t.Errorf("it is not, or not in these words: %v", err)
	}
}

func TestSecretInTheSettingsIsRefused(t *testing.T) {
	for settings, refused := range map[string]bool{
		"[projects.main]\napi_secret = \"x\"":               true,
		"projects.main.api_secret=\"x\"":                    true,
		"projects.main = { \"api_secret\" = \"x\" }":        true,
		"[projects.main]\napi_secret_file = \"/secrets/x\"": false,
		"# api_secret = \"x\"":                              false,
	} {
		_, err := template(map[string]any{"settings": settings})
		if (err != nil) != refused || err != nil && !strings.Contains(err.Error(), "name it in credentials") {
			t.Errorf("%s: %v", settings, err)
		}
	}
}

func TestTwoMonitorsOfOneCanaryAreRefused(t *testing.T) {
	with := values(t, "full")
	with["podMonitor"] = map[string]any{"enabled": true}
	if _, err := template(with); err == nil || !strings.Contains(err.Error(), "twice") {
		t.Errorf("they are not: %v", err)
	}
	with["serviceMonitor"] = map[string]any{"enabled": false}
	monitor := one[monitoring.PodMonitor](t, render(t, with))
	if endpoint := monitor.Spec.PodMetricsEndpoints[0]; *endpoint.Scheme != "https" || *endpoint.Port != "http" {
		t.Errorf("%+v", endpoint)
	}
}

// On OpenShift the cluster chooses them.
func TestIdsOfThePodCanBeRemoved(t *testing.T) {
	security := one[apps.Deployment](t, render(t, values(t, "full"))).Spec.Template.Spec.SecurityContext
	if security.RunAsUser != nil || security.FSGroup != nil || !*security.RunAsNonRoot {
		t.Errorf("%+v", security)
	}
}

func TestServiceSendsNothingToThePodOfHelmTest(t *testing.T) {
	files := render(t, values(t, "full"))
	service, pod := one[core.Service](t, files), one[core.Pod](t, files)
	matches := true
	for name, value := range service.Spec.Selector {
		matches = matches && pod.Labels[name] == value
	}
	if matches {
		t.Errorf("%v selects it", service.Spec.Selector)
	}
}

func TestValueThatNoTemplateReadsIsRefused(t *testing.T) {
	with := values(t, "least")
	with["setings"] = ""
	if _, err := template(with); err == nil {
		t.Error("a typing error passes")
	}
}

func TestDefaultRulesAndDashboardsAreThoseOfTheRepository(t *testing.T) {
	with := values(t, "least")
	with["prometheusRule"] = map[string]any{"enabled": true}
	with["dashboards"] = map[string]any{"enabled": true}
	files := render(t, with)

	var expected monitoring.PrometheusRuleSpec
	rules := read(t, path(t, "deploy", "prometheus", "livekit-canary.rules.yml"))
	if err := yaml.UnmarshalStrict([]byte(rules), &expected); err != nil {
		t.Fatal(err)
	}
	rule := one[monitoring.PrometheusRule](t, files)
	if len(expected.Groups) == 0 || !equal(t, rule.Spec, expected) {
		t.Error("the rules differ from deploy/prometheus")
	}

	shipped := map[string]string{}
	for _, document := range manifests(files) {
		object, err := decode(document)
		if err != nil {
			t.Fatal(err)
		}
		if settings, is := object.(*core.ConfigMap); is {
			for name, text := range settings.Data {
				shipped[name] = text
			}
		}
	}
	dashboards, err := filepath.Glob(path(t, "grafana", "dashboards", "*.json"))
	if err != nil || len(dashboards) == 0 {
		t.Fatalf("no dashboards: %v", err)
	}
	for _, dashboard := range dashboards {
		text := shipped["livekit-canary-"+filepath.Base(dashboard)]
		if strings.TrimSpace(text) != strings.TrimSpace(read(t, dashboard)) {
			t.Errorf("%s is not shipped as it is", dashboard)
		}
	}
}

func equal(t *testing.T, one, other any) bool {
	t.Helper()
	first, err := yaml.Marshal(one)
	if err != nil {
		t.Fatal(err)
	}
	second, err := yaml.Marshal(other)
	if err != nil {
		t.Fatal(err)
	}
	return string(first) == string(second)
}
