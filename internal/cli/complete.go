package cli

import (
	"context"
	"strconv"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/atollstore/atoll/internal/api"
	"github.com/atollstore/atoll/internal/api/atollv1"
)

// completeTime bounds what a shell waits for when it completes a name.
const completeTime = 300 * time.Millisecond

// completeArgs completes the arguments of a volume's command by what its usage
// line says of them: NAME is a volume, FILE a file.
func (a *App) completeArgs(cmd *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
	words := strings.Fields(cmd.Use)[1:]
	if len(words) == 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	i := len(args)
	if len(words) > 0 && strings.HasSuffix(words[len(words)-1], "...") {
		i = min(i, len(words)-1)
	}
	if i >= len(words) {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	word := strings.Trim(strings.TrimSuffix(words[i], "..."), "[]")
	volume, _, at := strings.Cut(prefix, "@")
	switch {
	case cmd.Name() == "create" && !strings.Contains(word, "@"):
		return nil, cobra.ShellCompDirectiveNoFileComp
	case word == "FILE" || word == "FIRST" || word == "SECOND":
		return nil, cobra.ShellCompDirectiveDefault
	case strings.HasPrefix(word, "NAME") && strings.Contains(word, "@VERSION") && at:
		return a.completeVersions(args, volume, prefix)
	case strings.HasPrefix(word, "PATH"):
		return a.completeTree(args, prefix)
	case strings.HasPrefix(word, "NAME"):
		names, d := a.completeVolumes(cmd, args, prefix)
		if strings.HasPrefix(word, "NAME@VERSION") {
			for i, n := range names {
				names[i] = strings.Replace(n, "\t", "@\t", 1)
			}
			d |= cobra.ShellCompDirectiveNoSpace
		}
		return names, d
	}
	return nil, cobra.ShellCompDirectiveNoFileComp
}

// completeVersions completes NAME@VERSION.
func (a *App) completeVersions(args []string, volume, prefix string) ([]string, cobra.ShellCompDirective) {
	return a.complete(args, prefix, func(ctx context.Context, c *api.Client) (names []string, err error) {
		r, err := (&image{c: c, name: volumeName(volume)}).list(ctx)
		if err != nil {
			return nil, err
		}
		for _, v := range r.Versions {
			names = append(names, volume+"@"+versionName(v)+"\t"+shortTime(v.Time.AsTime()))
		}
		return names, nil
	})
}

// completeTree completes a path, one directory at a time.
func (a *App) completeTree(args []string, prefix string) ([]string, cobra.ShellCompDirective) {
	dir := ""
	if i := strings.LastIndexByte(prefix, '/'); i >= 0 {
		dir = prefix[:i]
	}
	all, d := a.complete(args, prefix, func(ctx context.Context, c *api.Client) (names []string, err error) {
		entries, err := listTree(ctx, c, cleanPath(dir), false)
		for _, e := range entries {
			name := e.Path
			if e.Kind == kindDir {
				name += "/"
			}
			names = append(names, name+"\t"+e.Kind)
		}
		return names, err
	})
	if len(all) == 1 && strings.Contains(all[0], "/\t") {
		d |= cobra.ShellCompDirectiveNoSpace
	}
	return all, d
}

// completeTrash completes the ids of what is in the trash.
func (a *App) completeTrash(_ *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
	return a.complete(args, prefix, func(ctx context.Context, c *api.Client) (ids []string, err error) {
		all, err := listTrash(ctx, c)
		for _, e := range all {
			ids = append(ids, shortID(e.Id, all)+"\t"+e.Path)
		}
		return ids, err
	})
}

// completeVolumes completes volume names, quickly or not at all.
func (a *App) completeVolumes(_ *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
	return a.complete(args, prefix, func(ctx context.Context, c *api.Client) (names []string, err error) {
		r, err := c.Volumes.ListVolumes(ctx, connect.NewRequest(&atollv1.ListVolumesRequest{}))
		if err != nil {
			return nil, err
		}
		for _, v := range r.Msg.Volumes {
			names = append(names, v.Name+"\t"+FormatSize(v.SizeBytes))
		}
		return names, nil
	})
}

// CompleteNodes completes node numbers, quickly or not at all.
func (a *App) CompleteNodes(_ *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return a.complete(args, prefix, func(ctx context.Context, c *api.Client) (ids []string, err error) {
		r, err := c.Cluster.ListNodes(ctx, connect.NewRequest(&atollv1.ListNodesRequest{}))
		if err != nil {
			return nil, err
		}
		for _, n := range r.Msg.Nodes {
			ids = append(ids, strconv.Itoa(int(n.Id))+"\t"+n.Condition)
		}
		return ids, nil
	})
}

// complete asks the server for words and keeps those that fit.
func (a *App) complete(args []string, prefix string, ask func(context.Context, *api.Client) ([]string, error)) ([]string, cobra.ShellCompDirective) {
	c, err := a.dial()
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	defer c.Close()
	ctx, cancel := context.WithTimeout(context.Background(), completeTime)
	defer cancel()
	all, err := ask(ctx, c)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var fit []string
	for _, w := range all {
		name, _, _ := strings.Cut(w, "\t")
		used := false
		for _, arg := range args {
			used = used || arg == name
		}
		if strings.HasPrefix(name, prefix) && !used {
			fit = append(fit, w)
		}
	}
	return fit, cobra.ShellCompDirectiveNoFileComp
}

// completeFlags offers the values of flags that have few.
func completeFlags(root *cobra.Command) {
	values := map[string][]string{
		"output":  {"table", "json", "jsonl"},
		"cache":   {"writeback", "writethrough"},
		"pattern": {"read", "write", "randread", "randwrite"},
		"driver":  {"any", "nbd", "fuse"},
		"mkfs":    {"ext4", "xfs", "btrfs"},
		"script":  {"tour"},
	}
	var visit func(c *cobra.Command)
	visit = func(c *cobra.Command) {
		for name, list := range values {
			if c.LocalFlags().Lookup(name) != nil && (c == root || c.InheritedFlags().Lookup(name) == nil) {
				_ = c.RegisterFlagCompletionFunc(name, cobra.FixedCompletions(list, cobra.ShellCompDirectiveNoFileComp)) // fails if done already
			}
		}
		for _, sub := range c.Commands() {
			visit(sub)
		}
	}
	visit(root)
}
