package connector_test

import (
	"errors"
	"reflect"
	"testing"
	"time"

	"github.com/keyward/keyward/connector"
	"github.com/keyward/keyward/dek"
)

func goodAgentFile() connector.AgentFile {
	return connector.AgentFile{
		Socket: "/run/keyward/agent.sock", StateDir: "/var/lib/keyward-agent", HostSecretFile: "/etc/keyward/host-secret",
		Instances: []connector.AgentInstance{{Name: "shop", Kind: "mariadb", User: "mysql"}},
	}
}

func TestAgentFileCheck(t *testing.T) {
	for _, c := range []struct {
		name string
		edit func(*connector.AgentFile)
		want error
	}{
		{"good", func(*connector.AgentFile) {}, nil},
		{"all fields", func(c *connector.AgentFile) {
			c.Endpoints, c.Refresh, c.OutageLimit, c.DenialGrace = []string{"kms:7443"}, "10m", "72h", "5m"
			c.CacheKeys, c.MetricsListen = 5, "127.0.0.1:9464"
		}, nil},
		{"no socket", func(c *connector.AgentFile) { c.Socket = "" }, dek.ErrInvalid},
		{"relative socket", func(c *connector.AgentFile) { c.Socket = "agent.sock" }, dek.ErrInvalid},
		{"long socket", func(c *connector.AgentFile) { c.Socket = "/" + string(make([]byte, 108)) }, dek.ErrInvalid},
		{"no state", func(c *connector.AgentFile) { c.StateDir = "" }, dek.ErrInvalid},
		{"no host secret", func(c *connector.AgentFile) { c.HostSecretFile = "" }, dek.ErrInvalid},
		{"host secret in the state", func(c *connector.AgentFile) { c.HostSecretFile = c.StateDir + "/secret" }, dek.ErrInvalid},
		{"endpoint without port", func(c *connector.AgentFile) { c.Endpoints = []string{"kms"} }, dek.ErrInvalid},
		{"no instance", func(c *connector.AgentFile) { c.Instances = nil }, dek.ErrInvalid},
		{"instance twice", func(c *connector.AgentFile) { c.Instances = append(c.Instances, c.Instances[0]) }, dek.ErrInvalid},
		{"instance name", func(c *connector.AgentFile) { c.Instances[0].Name = "Shop DB" }, dek.ErrInvalid},
		{"no kind", func(c *connector.AgentFile) { c.Instances[0].Kind = "" }, dek.ErrInvalid},
		{"no user", func(c *connector.AgentFile) { c.Instances[0].User = "" }, dek.ErrInvalid},
		{"refresh too often", func(c *connector.AgentFile) { c.Refresh = "1s" }, dek.ErrInvalid},
		{"refresh without unit", func(c *connector.AgentFile) { c.Refresh = "60" }, dek.ErrInvalid},
		{"negative grace", func(c *connector.AgentFile) { c.DenialGrace = "-1s" }, dek.ErrInvalid},
		{"negative cache", func(c *connector.AgentFile) { c.CacheKeys = -1 }, dek.ErrInvalid},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg := goodAgentFile()
			c.edit(&cfg)
			b, err := cfg.Encode()
			if !errors.Is(err, c.want) {
				t.Fatalf("got %v, want %v", err, c.want)
			}
			if err != nil {
				return
			}
			back, err := connector.ParseAgentFile(b)
			if err != nil || !reflect.DeepEqual(back, cfg) {
				t.Errorf("parsed back: got %+v, %v, want %+v", back, err, cfg)
			}
		})
	}
}

func TestAgentFileConfig(t *testing.T) {
	f := goodAgentFile()
	f.Instances[0].User, f.Refresh, f.CacheKeys = "root", "10m", 7
	got, err := f.Config()
	if err != nil {
		t.Fatal(err)
	}
	if got.Refresh != 10*time.Minute || got.MaxKeys != 7 || got.SocketGID != 0 ||
		!reflect.DeepEqual(got.Instances, []connector.InstanceRule{{UID: 0, Instance: "shop"}}) {
		t.Errorf("got %+v", got)
	}
	f.Instances[0].User = "0"
	if again, err := f.Config(); err != nil || again.Instances[0].UID != 0 {
		t.Errorf("by number: got %+v, %v", again, err)
	}
	f.Instances[0].User = "nobody-of-this-name"
	if _, err := f.Config(); !errors.Is(err, dek.ErrInvalid) {
		t.Errorf("unknown account: got %v, want %v", err, dek.ErrInvalid)
	}
}

// agentFileSeeds are the shapes that a mutation should start from.
func agentFileSeeds() []string {
	good := `{"socket":"/s","state_dir":"/d","host_secret_file":"/h","instances":[{"name":"a","kind":"mariadb","user":"mysql"}]}`
	return []string{good, good + "{}", good[:len(good)-1] + `,"pin":"1234"}`, "", "{}", "null", "[]", `{"socket":1}`}
}

func TestParseAgentFileRefuses(t *testing.T) {
	seeds := agentFileSeeds()
	if _, err := connector.ParseAgentFile([]byte(seeds[0])); err != nil {
		t.Fatalf("the good one: %v", err)
	}
	for _, s := range seeds[1:] {
		if _, err := connector.ParseAgentFile([]byte(s)); !errors.Is(err, dek.ErrInvalid) {
			t.Errorf("%s: got %v, want %v", s, err, dek.ErrInvalid)
		}
	}
}

func FuzzParseAgentFile(f *testing.F) {
	for _, s := range agentFileSeeds() {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := connector.ParseAgentFile(b)
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
		back, err := connector.ParseAgentFile(again)
		if err != nil || !reflect.DeepEqual(back.Instances, c.Instances) || back.Socket != c.Socket {
			t.Fatalf("got %+v, %v, want %+v", back, err, c)
		}
	})
}
