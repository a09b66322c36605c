package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"

	"github.com/keyward/keyward/connector"
	"github.com/keyward/keyward/dek"
)

const softHSMModule = "/usr/lib/softhsm/libsofthsm2.so"

// buildPrograms builds our programs as they are shipped and returns their
// folder.
func buildPrograms(root, dir string) (string, error) {
	bin := filepath.Join(dir, "bin")
	if out, err := exec.Command("make", "-s", "-C", root, "go", "BIN="+bin).CombinedOutput(); err != nil {
		return "", fmt.Errorf("make go: %w: %s", err, out)
	}
	return bin, nil
}

// A service is a private keyward-kms with an enrolled administrator who, with
// strict mode off, may also do everything else.
type service struct {
	dir     string
	bin     string
	env     []string // points SoftHSM at the private token
	address string
	proc    *process

	admin    *connector.Admin
	adminID  *connector.Identity
	host     *connector.Identity // of a database host, once prepared
	closeAll []func() error      // of clients, before the service ends
}

// newService makes an installation, serves it and enrols. hsm asks for a
// SoftHSM2 token, else it is the software token.
func (b *bench) newService(ctx context.Context, hsm bool) (s *service, err error) {
	s = &service{dir: b.dir}
	if s.bin, err = b.programs(); err != nil {
		return nil, err
	}
	if s.address, err = freeAddress(); err != nil {
		return nil, err
	}
	if err := s.configure(ctx, hsm); err != nil {
		return nil, err
	}
	out, err := s.command(ctx, "init", "--config", s.path("kms.json"), "--admin-token-file", s.path("admin.token")).CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("keyward-kms init: %w: %s", err, out)
	}
	if err := s.start(ctx); err != nil {
		return nil, err
	}
	if err := s.enrol(ctx); err != nil {
		return nil, errors.Join(err, s.stop())
	}
	return s, nil
}

func (s *service) path(name string) string { return filepath.Join(s.dir, name) }

func (s *service) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, filepath.Join(s.bin, "keyward-kms"), args...)
	cmd.Env = append(os.Environ(), s.env...)
	return cmd
}

func (s *service) configure(ctx context.Context, hsm bool) error {
	cfg := map[string]any{"state_dir": s.path("kms"), "listen": []string{s.address}, "strict": false}
	if hsm {
		if err := s.makeToken(ctx); err != nil {
			return err
		}
		cfg["token"] = map[string]any{"module": softHSMModule, "uri": "pkcs11:token=bench", "pin_file": s.path("pin")}
	} else {
		cfg["software_token"] = s.path("token")
	}
	text, err := json.Marshal(cfg)
	if err != nil {
		return err
	}
	return os.WriteFile(s.path("kms.json"), text, 0o600)
}

// makeToken makes a SoftHSM2 token in the private directory. Its PIN protects
// nothing that outlives the benchmark.
func (s *service) makeToken(ctx context.Context) error {
	util, err := need("softhsm2-util", "softhsm2")
	if err != nil {
		return err
	}
	if err := os.Mkdir(s.path("softhsm"), 0o700); err != nil {
		return err
	}
	conf := s.path("softhsm.conf")
	text := "directories.tokendir = " + s.path("softhsm") + "\nobjectstore.backend = file\nlog.level = ERROR\n"
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		return err
	}
	const pin = "bench-4711"
	if err := os.WriteFile(s.path("pin"), []byte(pin+"\n"), 0o600); err != nil {
		return err
	}
	s.env = []string{"SOFTHSM2_CONF=" + conf}
	cmd := exec.CommandContext(ctx, util, "--init-token", "--free", "--label", "bench", "--so-pin", pin, "--pin", pin)
	cmd.Env = append(os.Environ(), s.env...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("softhsm2-util: %w: %s", err, out)
	}
	return nil
}

// start serves and returns when the port is open.
func (s *service) start(ctx context.Context) (err error) {
	cmd := s.command(context.WithoutCancel(ctx), "serve", "--config", s.path("kms.json"))
	if s.proc, err = spawn(cmd, s.path("kms.log")); err != nil {
		return err
	}
	if err := s.proc.listening(ctx, "tcp", s.address); err != nil {
		return errors.Join(err, s.stop())
	}
	return nil
}

// stop ends the service and the clients of it.
func (s *service) stop() error {
	for _, f := range s.closeAll {
		_ = f() // the service goes away with them
	}
	s.closeAll = nil
	return s.proc.end(syscall.SIGTERM)
}

// enrol redeems the administrator's token and takes the roles needed.
func (s *service) enrol(ctx context.Context) error {
	text, err := os.ReadFile(s.path("admin.token"))
	if err != nil {
		return err
	}
	t, err := connector.ParseTokenFile(text)
	if err != nil {
		return err
	}
	if s.adminID, err = connector.Enroll(ctx, t, connector.EnrollOptions{Dir: s.path("admin")}); err != nil {
		return err
	}
	if err := s.connectAdmin(); err != nil {
		return err
	}
	for _, role := range []string{"crypto officer", "auditor"} {
		if err := s.admin.AddGrant(ctx, connector.Grant{Principal: t.Principal, Role: role, Scope: "/"}); err != nil {
			return err
		}
	}
	return nil
}

// connectAdmin makes the administrator's client, again after a restart.
func (s *service) connectAdmin() error {
	c, err := s.connect(s.adminID)
	s.admin = connector.NewAdmin(c)
	return err
}

// connect makes a client that ends with the service; its first call connects.
func (s *service) connect(id *connector.Identity) (*connector.Client, error) {
	c, err := connector.NewClient(connector.Config{Identity: id, Logger: slog.New(slog.DiscardHandler)})
	if err == nil {
		s.closeAll = append(s.closeAll, c.Close)
	}
	return c, err
}

// pids are the service and the child that holds the token's module, if any.
func (s *service) pids() ([]int, error) {
	kids, err := children(s.proc.pid())
	return append([]int{s.proc.pid()}, kids...), err
}

// Names inside the service.
const (
	benchVault    = "bench"
	benchMaster   = "master"
	benchInstance = "bench"
)

func ringName(i int) string { return fmt.Sprintf("ring-%d", i) }

// prepare does the officer's part: a vault, an RSA-2048 master key, n keyrings
// and an instance that uses them. The token file enrols the instance's host.
func (s *service) prepare(ctx context.Context, n int) (connector.TokenFile, error) {
	if _, err := s.admin.CreateVault(ctx, benchVault); err != nil {
		return connector.TokenFile{}, err
	}
	if _, err := s.admin.CreateKey(ctx, connector.NewKey{Vault: benchVault, Name: benchMaster, Bits: 2048}); err != nil {
		return connector.TokenFile{}, err
	}
	err := each(ctx, n, func(ctx context.Context, i int) error {
		_, err := s.admin.CreateKeyring(ctx, connector.NewKeyring{Vault: benchVault, Name: ringName(i), MasterKey: benchMaster,
			ServerKey: uint32(i + 1)}) //nolint:gosec // a small index
		return err
	})
	if err != nil {
		return connector.TokenFile{}, err
	}
	in := connector.NewInstance{Kind: "mariadb", Name: benchInstance, Vault: benchVault}
	for i := range n {
		in.Keyrings = append(in.Keyrings, ringName(i))
	}
	prepared, token, err := s.admin.PrepareInstance(ctx, in)
	return s.admin.TokenFile(token, prepared), err
}

// prepareHost prepares n keyrings and enrols the host that may use them.
func (s *service) prepareHost(ctx context.Context, n int) error {
	t, err := s.prepare(ctx, n)
	if err != nil {
		return err
	}
	s.host, err = connector.Enroll(ctx, t, connector.EnrollOptions{Dir: s.path("host")})
	return err
}

// wraps are the wrapped DEKs of the host's instance, version by version.
func (s *service) wraps(ctx context.Context, c *connector.Client) ([]dek.Wrapped, error) {
	o, err := c.OpenInstance(ctx, benchInstance, true, nil)
	if err != nil {
		return nil, err
	}
	var ws []dek.Wrapped
	for _, k := range o.Keyrings {
		for _, v := range k.Versions {
			w, err := dek.ParseWrapped(v.Wrapped)
			if err != nil {
				return nil, fmt.Errorf("%s version %d: %w", k.Name, v.Version, err)
			}
			ws = append(ws, w)
		}
	}
	return ws, nil
}

func freeAddress() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}

// roll makes new versions until the keyrings have that many in all.
func (s *service) roll(ctx context.Context, rings, versions int) error {
	return each(ctx, rings, func(ctx context.Context, ring int) error {
		for range (versions - ring - 1) / rings {
			if _, err := s.admin.RollKeyring(ctx, "", benchVault, ringName(ring)); err != nil {
				return err
			}
		}
		return nil
	})
}
