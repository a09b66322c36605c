package connector_test

import (
	"errors"
	"reflect"
	"testing"
	"time"

	"github.com/keyward/keyward/connector"
	"github.com/keyward/keyward/dek"
)

func goodAgentConfig() connector.AgentConfig {
	return connector.AgentConfig{
		Socket: "/run/keyward/agent.sock", StateDir: "/var/lib/keyward-agent", HostSecretFile: "/etc/keyward/host-secret",
		Instances: []connector.AgentInstance{{Name: "shop", Kind: "mariadb", User: "mysql"}},
	}
}

func TestAgentConfigCheck(t *testing.T) {
	for _, c := range []struct {
		name string
		edit func(*connector.AgentConfig)
		want error
	}{
		{"good", func(*connector.AgentConfig) {}, nil},
		{"all fields", func(c *connector.AgentConfig) {
			c.Endpoints, c.Refresh, c.OutageLimit, c.DenialGrace = []string{"kms:7443"}, "10m", "72h", "5m"
			c.CacheKeys, c.MetricsListen = 5, "127.0.0.1:9464"
		}, nil},
		{"no socket", func(c *connector.AgentConfig) { c.Socket = "" }, dek.ErrInvalid},
		{"relative socket", func(c *connector.AgentConfig) { c.Socket = "agent.sock" }, dek.ErrInvalid},
		{"long socket", func(c *connector.AgentConfig) { c.Socket = "/" + string(make([]byte, 108)) }, dek.ErrInvalid},
		{"no state", func(c *connector.AgentConfig) { c.StateDir = "" }, dek.ErrInvalid},
		{"no host secret", func(c *connector.AgentConfig) { c.HostSecretFile = "" }, dek.ErrInvalid},
		{"host secret in the state", func(c *connector.AgentConfig) { c.HostSecretFile = c.StateDir + "/secret" }, dek.ErrInvalid},
		{"endpoint without port", func(c *connector.AgentConfig) { c.Endpoints = []string{"kms"} }, dek.ErrInvalid},
		{"no instance", func(c *connector.AgentConfig) { c.Instances = nil }, dek.ErrInvalid},
		{"instance twice", func(c *connector.AgentConfig) { c.Instances = append(c.Instances, c.Instances[0]) }, dek.ErrInvalid},
		{"instance name", func(c *connector.AgentConfig) { c.Instances[0].Name = "Shop DB" }, dek.ErrInvalid},
		{"no kind", func(c *connector.AgentConfig) { c.Instances[0].Kind = "" }, dek.ErrInvalid},
		{"no user", func(c *connector.AgentConfig) { c.Instances[0].User = "" }, dek.ErrInvalid},
		{"refresh too often", func(c *connector.AgentConfig) { c.Refresh = "1s" }, dek.ErrInvalid},
		{"refresh without unit", func(c *connector.AgentConfig) { c.Refresh = "60" }, dek.ErrInvalid},
		{"negative grace", func(c *connector.AgentConfig) { c.DenialGrace = "-1s" }, dek.ErrInvalid},
		{"negative cache", func(c *connector.AgentConfig) { c.CacheKeys = -1 }, dek.ErrInvalid},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg := goodAgentConfig()
			c.edit(&cfg)
			b, err := cfg.Encode()
			if !errors.Is(err, c.want) {
				t.Fatalf("got %v, want %v", err, c.want)
			}
			if err != nil {
				return
			}
			back, err := connector.ParseAgentConfig(b)
			if err != nil || !reflect.DeepEqual(back, cfg) {
				t.Errorf("parsed back: got %+v, %v, want %+v", back, err, cfg)
			}
		})
	}
}

func TestAgentConfigDefaults(t *testing.T) {
	cfg := goodAgentConfig()
	times, err := cfg.Durations()
	want := connector.AgentTimes{Refresh: time.Hour}
	if err != nil || times != want {
		t.Errorf("got %+v, %v, want %+v", times, err, want)
	}
	if got := cfg.Keys(); got != 10_000 {
		t.Errorf("keys: got %d, want 10000", got)
	}
}

// agentConfigSeeds are the shapes that a mutation should start from.
func agentConfigSeeds() []string {
	good := `{"socket":"/s","state_dir":"/d","host_secret_file":"/h","instances":[{"name":"a","kind":"mariadb","user":"mysql"}]}`
	return []string{good, good + "{}", good[:len(good)-1] + `,"pin":"1234"}`, "", "{}", "null", "[]", `{"socket":1}`}
}

func TestParseAgentConfigRefuses(t *testing.T) {
	seeds := agentConfigSeeds()
	if _, err := connector.ParseAgentConfig([]byte(seeds[0])); err != nil {
		t.Fatalf("the good one: %v", err)
	}
	for _, s := range seeds[1:] {
		if _, err := connector.ParseAgentConfig([]byte(s)); !errors.Is(err, dek.ErrInvalid) {
			t.Errorf("%s: got %v, want %v", s, err, dek.ErrInvalid)
		}
	}
}

func FuzzParseAgentConfig(f *testing.F) {
	for _, s := range agentConfigSeeds() {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := connector.ParseAgentConfig(b)
		if err != nil {
			if !errors.Is(err, dek.ErrInvalid) {
				t.Fatalf("error without its class: %v", err)
			}
			return
		}
		again, err := c.Encode()
		if err != nil {
			t.Fatalf("accepted but not encoded: %v", err)
		}
		back, err := connector.ParseAgentConfig(again)
		if err != nil || !reflect.DeepEqual(back.Instances, c.Instances) || back.Socket != c.Socket {
			t.Fatalf("got %+v, %v, want %+v", back, err, c)
		}
	})
}
