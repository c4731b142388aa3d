package cli

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// rbdParse splits a command line into words and options.
func rbdParse(args []string) (words []string, opts map[string][]string, err error) {
	opts = map[string][]string{}
	for i := 0; i < len(args); i++ {
		arg := args[i]
		name, value, given := "", "", false
		switch {
		case arg == "--":
			return append(words, args[i+1:]...), opts, nil
		case strings.HasPrefix(arg, "--"):
			name, value, given = strings.Cut(arg[2:], "=")
		case len(arg) > 1 && arg[0] == '-' && arg != "-h" && arg != "-v":
			if name = rbdShort[arg[1]]; name == "" {
				return nil, nil, &rbdFailure{1, fmt.Sprintf("unrecognised option '%s'", arg)}
			}
			value, given = strings.TrimPrefix(arg[2:], "="), len(arg) > 2
		case arg == "-h":
			name = "help"
		case arg == "-v":
			name = "version"
		default:
			words = append(words, arg)
			continue
		}
		plain := strings.HasPrefix(name, "rbd_") || strings.HasPrefix(name, "rbd-") // settings of Ceph's client
		if plain {
			name = strings.ReplaceAll(name, "-", "_")
		}
		if name == "mon-host" {
			name = "mon_host"
		}
		switch {
		case name == "help" || name == "version" || slices.Contains(rbdSwitches, name):
		case !plain && !slices.Contains(rbdValues, name):
			return nil, nil, &rbdFailure{1, fmt.Sprintf("unrecognised option '%s'", arg)}
		case !given && i+1 == len(args):
			return nil, nil, &rbdFailure{1, fmt.Sprintf("the required argument for option '--%s' is missing", name)}
		case !given:
			i++
			value = args[i]
		}
		opts[name] = append(opts[name], value)
	}
	return words, opts, nil
}

// rbdFind finds the verb that the first words name.
func rbdFind(words []string) (*rbdVerb, []string) {
	var best *rbdVerb
	length := 0
	verbs := rbdVerbs()
	for i := range verbs {
		for _, name := range append([]string{verbs[i].name}, verbs[i].aliases...) {
			w := strings.Fields(name)
			if len(w) > length && len(w) <= len(words) && slices.Equal(w, words[:len(w)]) {
				best, length = &verbs[i], len(w)
			}
		}
	}
	if best == nil {
		return nil, words
	}
	return best, words[length:]
}

// image reads which image is meant, by options or by a positional argument.
func (r *rbdCall) image(snap int) (spec, error) {
	return r.spec("pool", "namespace", "image", "snap", snap)
}

// dest is image for the second one.
func (r *rbdCall) dest(snap int) (spec, error) {
	return r.spec("dest-pool", "dest-namespace", "dest", "dest-snap", snap)
}

func (r *rbdCall) spec(pool, namespace, image, snap string, rule int) (s spec, err error) {
	dir := rbdDir(r.option(pool), r.option(namespace))
	name := r.option(image)
	if name == "" {
		name = r.take()
	}
	s, err = rbdSpec(name)
	switch {
	case err != nil:
		return s, err
	case s.name == "":
		return s, rbdInvalid("%s name was not specified", map[string]string{"image": "image", "dest": "destination image"}[image])
	}
	if !strings.Contains(name, "/") {
		s.name = rbdPath(dir, s.name)
	}
	if v := r.option(snap); v != "" {
		s.version = v
	}
	switch {
	case rule == snapNone && s.version != "":
		return s, rbdInvalid("snapshot name specified for a command that doesn't use it")
	case rule == snapMust && s.version == "":
		return s, rbdInvalid("snapshot name was not specified")
	}
	return s, nil
}

// rbdSpec reads [POOL/[NAMESPACE/]]IMAGE[@SNAP].
func rbdSpec(text string) (spec, error) {
	name, snap, at := strings.Cut(text, "@")
	parts := strings.Split(name, "/")
	bad := at && (snap == "" || strings.ContainsAny(snap, "@/")) || name != "" && slices.Contains(parts, "")
	if bad {
		return spec{}, rbdInvalid("invalid spec '%s'", text)
	}
	if len(parts) > 1 && parts[0] == rbdPool {
		parts = parts[1:]
	}
	return spec{strings.Join(parts, "/"), snap}, nil
}

// rbdDir is the directory that a pool and a namespace stand for.
func rbdDir(pool, namespace string) string {
	pool = strings.Trim(pool, "/")
	if pool == rbdPool {
		pool = ""
	} else if p, ok := strings.CutPrefix(pool, rbdPool+"/"); ok {
		pool = p
	}
	return rbdPath(pool, namespace)
}

// rbdPath joins a directory and a name.
func rbdPath(dir, name string) string {
	if dir == "" || name == "" {
		return dir + name
	}
	return dir + "/" + name
}

// rbdPlace splits a path into what rbd calls pool, namespace and image.
func rbdPlace(path string) (pool, namespace, image string) {
	parts := strings.Split(path, "/")
	image = parts[len(parts)-1]
	if len(parts) == 1 {
		return rbdPool, "", image
	}
	return parts[0], strings.Join(parts[1:len(parts)-1], "/"), image
}

// rbdFull writes a path as rbd shows images of any pool.
func rbdFull(path string) string {
	pool, namespace, image := rbdPlace(path)
	return rbdPath(rbdPath(pool, namespace), image)
}

func baseName(path string) string { return path[strings.LastIndexByte(path, '/')+1:] }

// path reads which file is meant.
func (r *rbdCall) path() (string, error) {
	p := r.option("path")
	if p == "" {
		p = r.take()
	}
	if p == "" {
		return "", rbdInvalid("path was not specified")
	}
	return p, nil
}

// size reads a size as rbd does: a bare number means units of the given size.
func (r *rbdCall) size(option string, unit int64) (int64, error) {
	text := r.option(option)
	digits := strings.TrimRight(text, "0123456789.")
	if digits == "" && text != "" {
		if n, err := strconv.ParseInt(text, 10, 64); err == nil && n <= (1<<62)/unit {
			return n * unit, nil
		}
	}
	suffix := strings.TrimLeft(text, "0123456789.")
	if strings.EqualFold(suffix, "e") {
		text = strings.TrimSuffix(text, suffix) + "P"
		n, err := parseSize(text)
		if err == nil && n < 1<<52 {
			return n << 10, nil
		}
	}
	n, err := parseSize(text)
	if err != nil {
		return 0, &rbdFailure{1, fmt.Sprintf("the argument for option '--%s' is invalid", option)}
	}
	return n, nil
}

// number reads an option that is a number.
func (r *rbdCall) number(option string) (uint64, error) {
	if !r.has(option) {
		return 0, nil
	}
	n, err := strconv.ParseUint(r.option(option), 10, 32)
	if err != nil {
		return 0, &rbdFailure{1, fmt.Sprintf("the argument for option '--%s' is invalid", option)}
	}
	return n, nil
}
