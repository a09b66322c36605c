package main

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/keyward/keyward/connector"
	"github.com/keyward/keyward/dek"
)

// kindMariaDB is the kind of instance that plugins/mariadb serves.
const kindMariaDB = "mariadb"

// defaultRings are what every fully encrypted MariaDB server needs: key id 1
// is its system data, 2 its temporary files.
var defaultRings = []string{"1=system", "2=temp"}

// A ringPlan is a keyring that a server knows by a key id.
type ringPlan struct {
	serverKey uint32
	name      string
}

// A preparePlan is what `plugin prepare` shall bring about.
type preparePlan struct {
	kind, instance string
	vault, key     string
	bits           int
	rings          []ringPlan
	lifetime       time.Duration
	out            string
}

// A madeView is one step of a preparation.
type madeView struct {
	What string `json:"what"` // "vault shop"
	Made bool   `json:"made"` // false: it was there
}

type preparedView struct {
	Instance  connector.Instance `json:"instance"`
	Steps     []madeView         `json:"steps"`
	TokenFile string             `json:"token_file"`
	Expires   time.Time          `json:"expires"`
	Next      string             `json:"next"`
}

func (a *app) prepareMariaDBCmd() *cobra.Command {
	p := preparePlan{kind: kindMariaDB}
	var rings []string
	cmd := &cobra.Command{
		Use:   "mariadb NAME -o FILE",
		Short: "Prepare a MariaDB server",
		Long: `Makes what is missing of vault, master key and keyrings, gives the host NAME the
right to use those keyrings and nothing else, and writes a one-time token file for
the DBA. Running it again makes nothing twice; it makes a new token.

Servers that name the same keyrings of the same vault share their keys: replicas
then can take over each other's data files and backups.`,
		Example: `  keyward plugin prepare mariadb shop-db --vault shop -o shop-db.token
  keyward plugin prepare mariadb shop-db --vault shop --keyring 1=system --keyring 2=temp --keyring 7=payroll -o shop-db.token`,
		Args: args(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			p.instance = args[0]
			if err := p.check(rings); err != nil {
				return err
			}
			c, err := a.client(cmd.Context())
			if err != nil {
				return err
			}
			v, err := p.carryOut(cmd.Context(), c)
			if err != nil {
				a.tellMade(v.Steps)
				return err
			}
			return a.emit(v, v.print)
		},
	}
	f := cmd.Flags()
	f.StringVar(&p.vault, "vault", "", "`vault` for its keys (default: NAME)")
	f.StringVar(&p.key, "key", "master", "master `key` of the vault")
	f.IntVar(&p.bits, "bits", 3072, "RSA modulus of a master key that is made: 2048, 3072 or 4096 `bits`")
	f.StringArrayVar(&rings, "keyring", defaultRings, "`id=name` of a keyring and the key id the server knows it by; repeat it")
	f.DurationVar(&p.lifetime, "lifetime", time.Hour, "how long the token works; at most 720h")
	f.StringVarP(&p.out, "output", "o", "", "token `file` to write, made with mode 0600")
	return cmd
}

// check completes the plan and refuses, as wrong use, what can't be meant.
func (p *preparePlan) check(rings []string) error {
	if err := checkName("instance", p.instance); err != nil {
		return err
	}
	if p.vault == "" {
		p.vault = p.instance
	}
	if err := checkName("vault", p.vault); err != nil {
		return err
	}
	if err := checkName("key", p.key); err != nil {
		return err
	}
	if p.bits != 2048 && p.bits != 3072 && p.bits != 4096 {
		return wrongUse("--bits %d: want 2048, 3072 or 4096", p.bits)
	}
	p.rings = nil
	for _, r := range rings {
		ring, err := p.parseRing(r)
		if err != nil {
			return err
		}
		p.rings = append(p.rings, ring)
	}
	if !slices.ContainsFunc(p.rings, func(r ringPlan) bool { return r.serverKey == 1 }) {
		return wrongUse("no --keyring 1=…: MariaDB can't start encrypted without key id 1 (system data)")
	}
	return checkTokenFlags(p.out, p.lifetime)
}

func (p *preparePlan) parseRing(s string) (ringPlan, error) {
	id, name, ok := strings.Cut(s, "=")
	n, err := strconv.ParseUint(id, 10, 32)
	if !ok || err != nil || n == 0 {
		return ringPlan{}, wrongUse("--keyring %q: want ID=NAME, such as 1=system", s)
	}
	r := ringPlan{uint32(n), name}
	for _, have := range p.rings {
		if have.serverKey == r.serverKey || have.name == r.name {
			return ringPlan{}, wrongUse("--keyring %q: key id %d or keyring %s is named twice", s, r.serverKey, r.name)
		}
	}
	return r, checkName("keyring", name)
}

// A preparer is what a preparation asks of the service.
type preparer interface {
	ensureVault(ctx context.Context, name string) (made bool, err error)
	ensureKey(ctx context.Context, want connector.NewKey) (made bool, err error)
	ensureKeyring(ctx context.Context, want connector.NewKeyring) (made bool, err error)
	prepareInstance(ctx context.Context, n connector.NewInstance) (connector.Instance, connector.TokenFile, error)
}

// carryOut makes what is missing, step by step; on an error the view says
// what was made before it.
func (p *preparePlan) carryOut(ctx context.Context, c preparer) (preparedView, error) {
	var v preparedView
	step := func(what string, made bool, err error) error {
		if err == nil {
			v.Steps = append(v.Steps, madeView{what, made})
		} else if len(v.Steps) > 0 && hintFor(err) == hintFor(dek.ErrUnavailable) {
			err = withHint(err, "what is made stays made: run the same command again to go on")
		}
		return err
	}
	made, err := c.ensureVault(ctx, p.vault)
	if err := step("vault "+p.vault, made, err); err != nil {
		return v, err
	}
	// The ids name the act, so that a second run finds what the first one made
	// even if its answer was lost.
	made, err = c.ensureKey(ctx, connector.NewKey{RequestID: p.requestID("key", p.key), Vault: p.vault, Name: p.key, Bits: p.bits})
	if err := step("key "+p.vault+"/"+p.key, made, err); err != nil {
		return v, err
	}
	for _, r := range p.rings {
		made, err = c.ensureKeyring(ctx, connector.NewKeyring{RequestID: p.requestID("keyring", r.name),
			Vault: p.vault, Name: r.name, MasterKey: p.key, ServerKey: r.serverKey})
		if err := step(fmt.Sprintf("keyring %s/%s (key id %d)", p.vault, r.name, r.serverKey), made, err); err != nil {
			return v, err
		}
	}
	in, tok, err := c.prepareInstance(ctx, connector.NewInstance{RequestID: p.requestID("instance", p.instance), Kind: p.kind,
		Name: p.instance, Vault: p.vault, Keyrings: p.names(), Lifetime: p.lifetime})
	if err := step("instance "+p.instance+" and its rights on these keyrings", true, err); err != nil {
		return v, err
	}
	if err := tok.Save(p.out); err != nil {
		return v, withHint(err, "the token is lost: run the same command again with a file that can be written")
	}
	v.Instance, v.TokenFile, v.Expires = in, p.out, tok.Expires.UTC()
	v.Next = fmt.Sprintf("keyward plugin register %s --token-file %s --server-socket /run/mysqld/mysqld.sock", p.kind, p.out)
	return v, nil
}

// requestID names one act of this plan for the service.
func (p *preparePlan) requestID(what, name string) string {
	return "prepare-" + p.kind + "-" + what + "-" + p.vault + "-" + name
}

// names returns the keyrings' names.
func (p *preparePlan) names() []string {
	var names []string
	for _, r := range p.rings {
		names = append(names, r.name)
	}
	return names
}

func (a *app) tellMade(steps []madeView) {
	for _, s := range steps {
		if s.Made {
			a.note("keyward: note: made %s", s.What)
		}
	}
}

func (v preparedView) print(t *table) {
	for _, s := range v.Steps {
		if s.Made {
			t.row("made", s.What)
		} else {
			t.row("there", s.What)
		}
	}
	t.line("token file %s, works once, until %s", v.TokenFile, when(v.Expires))
	t.line("hand it to the DBA, who runs on the database host:")
	t.line("  %s", v.Next)
}
