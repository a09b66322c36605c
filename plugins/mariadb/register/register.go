package register

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/keyward/keyward/connector"
	"github.com/keyward/keyward/dek"
)

// kind is what this package registers.
const kind = "mariadb"

// A Config says what to register and where its parts go. All paths are
// absolute.
type Config struct {
	// TokenFile is what the officer prepared. Required.
	TokenFile string
	// Replace enrols anew over an identity that is there.
	Replace bool
	// Login reaches the running server. Required.
	Login Login
	// ServerUser is the account mariadbd runs as: the only one that gets keys.
	ServerUser string
	// ConfigDir is a directory the server includes in its configuration.
	ConfigDir string
	// PluginFile is the plugin's name in the server's plugin directory.
	PluginFile string
	// AgentConfig, AgentState, HostSecretFile and AgentSocket are the agent's.
	AgentConfig    string
	AgentState     string
	HostSecretFile string
	AgentSocket    string
	// AgentProgram is the agent. Empty: beside this program, then PATH.
	AgentProgram string
	// Start says how the agent is started.
	Start StartMode
	// Report hears of each step when it is done; nil: nobody does.
	Report func(Step)
}

// A Step is one thing that registration brought about.
type Step struct {
	What   string `json:"what"`
	Made   bool   `json:"made"` // false: it was so already
	Detail string `json:"detail,omitempty"`
}

// A Result is what came of a registration; with an error it holds what was
// done before it.
type Result struct {
	Instance  string `json:"instance"`
	Principal string `json:"principal"`
	Steps     []Step `json:"steps"`
	Proof     Proof  `json:"proof"`
	Parts     []Part `json:"parts"`
}

// Steps is how many steps a registration has.
const Steps = 7

// A registration is one run of Run.
type registration struct {
	Config
	token  connector.TokenFile
	server *Server
	facts  Facts
	runner runner
	result Result
}

// Run registers a server. It can be run again at any time. Everything that can
// be checked is checked before the one-time token is spent. dek.ErrInvalid:
// something given can't be right; dek.ErrExists: this host or server is taken
// by another instance or plugin; dek.ErrPrecondition: the agent or the server
// refuses, the text says why; dek.ErrUnavailable and dek.ErrDenied: as the key
// service or the server answered; dek.ErrCorrupt: the proof failed, the server
// is not protected.
func Run(ctx context.Context, cfg Config) (Result, error) {
	r := &registration{Config: cfg}
	if err := r.prepare(ctx); err != nil {
		return r.result, err
	}
	defer r.server.Close()
	for _, step := range [Steps]func(context.Context) (Step, error){
		r.enrol, r.writeAgentConfig, r.startAgent, r.writeFirstStage, r.install, r.prove, r.writeFinalStage,
	} {
		s, err := step(ctx)
		if err != nil {
			return r.result, err
		}
		r.result.Steps = append(r.result.Steps, s)
		if r.Report != nil {
			r.Report(s)
		}
	}
	var err error
	r.result.Parts, err = r.server.Parts(ctx)
	return r.result, err
}

// prepare checks everything that can be checked without changing anything.
func (r *registration) prepare(ctx context.Context) (err error) {
	if r.token, err = connector.ReadTokenFile(r.TokenFile); err != nil {
		return err
	}
	if r.token.Kind != kind || r.token.Instance == "" {
		return fmt.Errorf("%w: the token file is for %s, not for a MariaDB server: it comes from `keyward plugin prepare mariadb`", dek.ErrInvalid, r.token.Principal)
	}
	r.result.Instance, r.result.Principal = r.token.Instance, r.token.Principal
	r.result.Steps, r.result.Parts = []Step{}, []Part{}
	if err := r.checkPlaces(); err != nil {
		return err
	}
	r.runner = runner{mode: r.Start, program: r.AgentProgram, config: r.AgentConfig, state: r.AgentState,
		socket: r.AgentSocket, units: unitDir}
	if r.Start != StartNone {
		if r.runner.program == "" {
			r.runner.program, err = findProgram("keyward-agent")
		}
		if err != nil {
			return err
		}
	}
	if r.server, err = Dial(ctx, r.Login); err != nil {
		return err
	}
	if err := r.checkServer(ctx); err != nil {
		r.server.Close()
		return err
	}
	return nil
}

func (r *registration) checkPlaces() error {
	if _, err := ParseStartMode(string(r.Start)); err != nil {
		return err
	}
	if !soname.MatchString(r.PluginFile) {
		return fmt.Errorf("%w: plugin file %q: give its bare name, such as %s", dek.ErrInvalid, r.PluginFile, DefaultPluginFile)
	}
	if err := checkCnfValue("agent socket", r.AgentSocket); err != nil {
		return err
	}
	if err := r.agentFile().Check(); err != nil {
		return err
	}
	if _, _, err := connector.LookupAccount(r.ServerUser); err != nil {
		return fmt.Errorf("server user: %w", err)
	}
	return checkDir("server configuration directory", r.ConfigDir)
}

func (r *registration) checkServer(ctx context.Context) (err error) {
	if r.facts, err = r.server.Facts(ctx); err != nil {
		return err
	}
	st, err := r.server.Plugin(ctx, r.PluginFile)
	if err != nil {
		return err
	}
	if st.Other != "" {
		return fmt.Errorf("%w: the server uses the encryption plugin %s and can't have two; decrypt its tables and remove that plugin first", dek.ErrExists, st.Other)
	}
	if _, err := os.Stat(r.facts.PluginDir); err != nil {
		return nil // another host's directory: the server will tell
	}
	file := filepath.Join(r.facts.PluginDir, withSuffix(r.PluginFile))
	if _, err := os.Stat(file); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: the server's plugin directory %s has no %s: install the plugin there", dek.ErrPrecondition, r.facts.PluginDir, withSuffix(r.PluginFile))
	}
	return nil
}

func withSuffix(library string) string { return strings.TrimSuffix(library, ".so") + ".so" }

// agentFile is the agent's configuration as this registration wants it.
func (r *registration) agentFile() connector.AgentFile {
	return connector.AgentFile{
		Socket: r.AgentSocket, StateDir: r.AgentState, HostSecretFile: r.HostSecretFile,
		Instances: []connector.AgentInstance{{Name: r.token.Instance, Kind: kind, User: r.ServerUser}},
	}
}

// enrol spends the token, unless the host is enrolled already.
func (r *registration) enrol(ctx context.Context) (Step, error) {
	s := Step{What: "host enrolled as " + r.token.Principal}
	if err := os.MkdirAll(filepath.Dir(r.AgentState), 0o755); err != nil {
		return s, err
	}
	id, err := connector.LoadIdentity(r.AgentState, r.HostSecretFile)
	switch {
	case err == nil && !r.Replace:
		defer id.Close()
		if id.Principal() != r.token.Principal {
			return s, fmt.Errorf("%w: the agent of %s is enrolled as %s: give this instance an agent of its own (--agent-config, --agent-state, --socket)",
				dek.ErrExists, r.AgentState, id.Principal())
		}
		return s, nil
	case err == nil:
		id.Close()
	case errors.Is(err, dek.ErrNotFound), r.Replace:
	default:
		return s, err
	}
	id, err = connector.Enroll(ctx, r.token, connector.EnrollOptions{Dir: r.AgentState, HostSecretFile: r.HostSecretFile, Replace: r.Replace})
	if err != nil {
		return s, err
	}
	defer id.Close()
	_, until := id.Validity()
	s.Made, s.Detail = true, "certificate until "+until.UTC().Format("2006-01-02 15:04 MST")+", key sealed under "+r.HostSecretFile
	return s, nil
}

// writeAgentConfig writes the agent's configuration; what an operator has
// tuned in one that is there stays.
func (r *registration) writeAgentConfig(context.Context) (Step, error) {
	s := Step{What: "agent configuration " + r.AgentConfig}
	cfg := r.agentFile()
	old, err := connector.ReadAgentFile(r.AgentConfig)
	switch {
	case err == nil:
		if old.Instances[0].Name != r.token.Instance || len(old.Instances) != 1 {
			return s, fmt.Errorf("%w: %s is for the instance %s: give this one an agent of its own", dek.ErrExists, r.AgentConfig, old.Instances[0].Name)
		}
		cfg.Refresh, cfg.OutageLimit, cfg.DenialGrace = old.Refresh, old.OutageLimit, old.DenialGrace
		cfg.CacheKeys, cfg.MetricsListen = old.CacheKeys, old.MetricsListen
	case !errors.Is(err, fs.ErrNotExist):
		return s, err
	}
	b, err := cfg.Encode()
	if err != nil {
		return s, err
	}
	if err := makeDir(filepath.Dir(r.AgentConfig)); err != nil {
		return s, err
	}
	s.Made, err = writeFile(r.AgentConfig, b, 0o644)
	return s, err
}

// makeDir makes dir if it is not there, readable whatever the umask.
func makeDir(dir string) error {
	if _, err := os.Stat(dir); err == nil {
		return nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return os.Chmod(dir, 0o755) //nolint:gosec // it holds a configuration without secrets
}

func (r *registration) startAgent(ctx context.Context) (Step, error) {
	changed := len(r.result.Steps) == 2 && (r.result.Steps[0].Made || r.result.Steps[1].Made)
	made, detail, err := r.runner.start(ctx, changed)
	return Step{What: "agent answers on " + r.AgentSocket, Made: made, Detail: detail}, err
}

func (r *registration) cnfPath() string { return filepath.Join(r.ConfigDir, cnfName) }

// writeFirstStage gives the server the plugin's options, nothing that demands
// encryption.
func (r *registration) writeFirstStage(context.Context) (Step, error) {
	s := Step{What: "plugin options in " + r.cnfPath()}
	have, err := os.ReadFile(r.cnfPath())
	if err == nil && bytes.Equal(have, r.final()) {
		return s, nil
	}
	s.Made, err = writeFile(r.cnfPath(), firstStage(r.AgentSocket, r.token.Instance), 0o644)
	return s, err
}

func (r *registration) final() []byte {
	return finalStage(r.PluginFile, r.AgentSocket, r.token.Instance)
}

// install loads the plugin and makes sure that it read our options.
func (r *registration) install(ctx context.Context) (Step, error) {
	s := Step{What: "plugin " + r.PluginFile + " loaded"}
	log := r.errorLog()
	begin := fileSize(log)
	var err error
	if s.Made, err = r.server.Install(ctx, r.PluginFile); err != nil {
		return s, fmt.Errorf("%w%s", err, lastKeywardLine(log, begin))
	}
	got, _, err := r.server.Variable(ctx, "KEYWARD_SOCKET")
	if err != nil {
		return s, err
	}
	if got != r.AgentSocket {
		return s, fmt.Errorf("%w: the server's plugin uses the socket %s, not %s: the server does not read %s, or was started before with another socket; name the right directory or restart the server",
			dek.ErrPrecondition, got, r.AgentSocket, r.ConfigDir)
	}
	return s, nil
}

// errorLog is the path of the server's error log, empty if it has none.
func (r *registration) errorLog() string {
	if r.facts.ErrorLog == "" || filepath.IsAbs(r.facts.ErrorLog) {
		return r.facts.ErrorLog
	}
	return filepath.Join(r.facts.DataDir, r.facts.ErrorLog)
}

func fileSize(path string) int64 {
	st, err := os.Stat(path)
	if err != nil {
		return 0
	}
	return st.Size()
}

// lastKeywardLine finds the plugin's own words in the server's log; long ones
// stand on several lines, those after the first begin with "...".
func lastKeywardLine(path string, begin int64) string {
	b, err := os.ReadFile(path)
	if err != nil || int64(len(b)) <= begin {
		return "; see the server's error log"
	}
	found := ""
	for line := range strings.Lines(string(b[begin:])) {
		_, text, ok := strings.Cut(line, "keyward: ")
		if more, goesOn := strings.CutPrefix(strings.TrimSpace(text), "..."); ok && goesOn {
			found += " " + strings.TrimSpace(more)
		} else if ok {
			found = strings.TrimSpace(text)
		}
	}
	if found == "" {
		return "; see the server's error log " + path
	}
	return "; its error log says: " + found
}

func (r *registration) prove(ctx context.Context) (Step, error) {
	p, err := r.server.Prove(ctx)
	r.result.Proof = p
	s := Step{What: "encrypted table proved", Made: true, Detail: fmt.Sprintf("key id %d version %d", p.KeyID, p.Version)}
	switch {
	case p.Control:
		s.Detail += "; its row is not in its file, and is in the file of an unencrypted table"
	default:
		s.Detail += ", by the server's word: its files can't be read from here"
	}
	return s, err
}

// writeFinalStage makes encryption permanent and switches on in the running
// server what needs no restart.
func (r *registration) writeFinalStage(ctx context.Context) (Step, error) {
	s := Step{What: "encryption of everything in " + r.cnfPath()}
	var err error
	if s.Made, err = writeFile(r.cnfPath(), r.final(), 0o644); err != nil {
		return s, err
	}
	return s, r.server.EncryptNow(ctx)
}
